#!/usr/bin/env bash
# Trains a tiny random model of each family through `accelerate launch` and looks at what the run left.
#
#   scripts/smoke.sh PYTHON [--key value ...]     overrides go to the recipe
set -euo pipefail
cd "$(dirname "$0")/.."
python="$1"
shift

for family in llama gemma2 qwen2; do
    folder="runs/smoke/$family"
    rm -rf "$folder"
    "$python" -m tests.tiny --family "$family" --out "$folder/model" >/dev/null
    echo "[smoke] $family"
    "$python" -m accelerate.commands.launch scripts/train.py recipes/smoke.yaml \
        --model_name_or_path "$folder/model" --output_dir "$folder/run" "$@"
    for file in adapter_model.safetensors metrics.json recipe.yaml README.md; do
        if [[ ! -s "$folder/run/$file" ]]; then
            echo "error: the run of $family left no $folder/run/$file" >&2
            exit 1
        fi
    done
done
echo "[smoke] passed: llama, gemma2, qwen2"
