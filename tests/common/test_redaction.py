from __future__ import annotations

import os
import string
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.common.redaction import REDACTED, is_secret_name, portable_path, redact, redact_text

# Made up on the spot, in the shape of the real ones; split so that no scanner takes this file for a leak.
_BODY = "Ab3dEf6hIj9lMn2pQr5tUv8xYz1bCd4fGh7"
TOKENS = {
    "hugging_face": "hf_" + _BODY,
    "openai": "sk-" + _BODY,
    "openai_project": "sk-proj-" + _BODY + "_-" + _BODY,
    "anthropic": "sk-ant-api03-" + _BODY,
    "stripe": "sk_live_" + _BODY,
    "github": "ghp_" + _BODY,
    "github_fine": "github_pat_" + _BODY,
    "gitlab": "glpat-" + _BODY,
    "aws": "AKIA" + "ABCDEFGHIJ234567",
    "google": "AIza" + _BODY,
    "slack": "xoxb-" + "123456789012-" + _BODY,
    "groq": "gsk_" + _BODY,
    "replicate": "r8_" + _BODY,
    "nvidia": "nvapi-" + _BODY,
    "wandb": "wandb_v1_" + _BODY,
    "pypi": "pypi-" + _BODY,
    "databricks": "dapi" + "0123456789abcdef" * 2,
    "jwt": "eyJhbGciOiJIUzI1" + ".eyJzdWIiOiIxMjM0" + ".SflKxwRJSMeKKF2Q",
    "private_key": "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_a_token_is_found_by_its_shape_wherever_it_stands(token: str) -> None:
    for text in (token, f"see {token}, then", f'{{"note": "{token}"}}', f"--note={token}", f"a\n{token}\nb"):
        assert token not in redact_text(text) and REDACTED in redact_text(text)
    nested = {"a": [{"b": (token, Path("x") / "y")}], token: 1}
    assert token not in repr(redact(nested))


@pytest.mark.parametrize(
    "name",
    ["hub_token", "token", "api_key", "api-key", "apiKey", "OPENAI_API_KEY", "WANDB_API_KEY", "--hub_token", "hf.token",
     "secret", "client_secret", "password", "db_pwd", "Authorization", "cookie", "aws_secret_access_key", "passphrase"],
)  # fmt: skip
def test_the_value_of_a_secret_setting_is_hidden_whatever_it_looks_like(name: str) -> None:
    assert is_secret_name(name)
    assert redact({name: "plain words"}) == {name: REDACTED}
    assert redact({name: ["plain", "words"]}) == {name: [REDACTED, REDACTED]}
    flag = f"--{name.lstrip('-')}"
    assert redact(["train.py", flag, "value9", "--lr", "1e-4"]) == [
        "train.py",
        flag,
        REDACTED,
        "--lr",
        "1e-4",
    ]
    assert redact([f"{flag}=value9"]) == [f"{flag}={REDACTED}"]
    assert redact_text(f"x {name}=value9 y") == f"x {name}={REDACTED} y"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token", "<|im_end|>"),
        ("pad_token", "<pad>"),
        ("max_new_tokens", 512),
        ("max_tokens_per_row", 512),
        ("reference_tokens_per_batch", 2048),
        ("tokens", 12345),
        ("tokenizer", "some/tokenizer"),
        ("keys", ["a", "b"]),
        ("monkey", "see"),
        ("sort_key", "length"),
        ("learning_rate", 3e-4),
        ("hub_token", None),
        ("token", True),
        ("api_key", "${OPENAI_API_KEY}"),
        ("api_key", ""),
        ("pwd", "."),
    ],
)
def test_what_is_no_secret_stays(name: str, value: Any) -> None:
    assert redact({name: value}) == {name: value}


@pytest.mark.parametrize(
    "text",
    [
        "nats per token: 0.123456",
        "mean log-likelihood per token: higher is better",
        "token normalization and basic understanding",
        "pip install hf_transfer",
        "task-specific-and-very-long-name",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "3f8a9c1e2b4d5f60718293a4b5c6d7e8f9012345",  # a commit
        "https://huggingface.co/org/name",
        "",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact_text(text) == text


def test_a_file_is_no_token_though_its_name_begins_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sk-slovak-preference-pairs-v2"
    for kind in ("jsonl", "json", "csv", "parquet", "yaml", "safetensors"):
        assert redact_text(f"--dataset=data/{name}.{kind}, then") == f"--dataset=data/{name}.{kind}, then"
        assert redact({"dataset": [f"{name}.{kind}"]}) == {"dataset": [f"{name}.{kind}"]}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / name).mkdir(parents=True)
    assert redact({"output_dir": f"runs/{name}"}) == {"output_dir": f"runs/{name}"}
    for text in (f"{name}.jsonlx", f"{name}.", f"{name}/x", f"runs/{name}-2", f"see runs/{name}"):
        assert REDACTED in redact_text(text)


# Each repeats what some pattern begins with, or what it goes on with, without ever coming to its end.
ENDLESS = [
    "9", "a", "-", ".", "=", " ", "token", "token ", "token=", "_key", ".pwd", "key:", '"token"', "eyJ12345678-",
    "eyJ12345678.", "eyJ-", "a-", "://a:", "-----BEGIN A", "Bearer ", "Bearer a", "Authorization: ", "/home/", "/home/a",
    "C:\\Users\\", "AKIA", "sk-", "hf_a", "xoxb-1",
]  # fmt: skip


@pytest.mark.parametrize("unit", ENDLESS)
@pytest.mark.parametrize("begin", ["", "token", "Bearer", "eyJ12345678.", "://"])
def test_time_grows_in_proportion_to_the_length_whatever_the_text(begin: str, unit: str) -> None:
    def seconds(length: int) -> float:
        text = (begin + unit * length)[:length]
        started = time.process_time()
        redact_text(text)
        return time.process_time() - started

    # In proportion: 8 times. By the square: 64 times.
    assert min(seconds(16_000) for _ in range(2)) < 24 * max(seconds(2_000), 1e-3)


def test_numbers_under_a_passwords_name_are_hidden_and_counts_are_not() -> None:
    assert redact({"password": 123456, "access_token": 7}) == {"password": REDACTED, "access_token": 7}


def test_logins_in_addresses_and_headers_are_hidden() -> None:
    assert redact_text("https://bob:pa55@host/x?y=1") == f"https://{REDACTED}@host/x?y=1"
    assert redact_text("https://host/x?token=abcd1234&y=1") == f"https://host/x?token={REDACTED}&y=1"
    assert redact_text("Authorization: Bearer abc123def456ghi") == f"Authorization: Bearer {REDACTED}"
    assert redact_text("Authorization: Basic Ym9iOnBhNTU1NTU=") == f"Authorization: Basic {REDACTED}"
    assert "abcd1234" not in redact_text("{'token': 'abcd1234'}")
    assert redact_text("note: hub_token=abcd1234") == f"note: hub_token={REDACTED}"


def test_a_secret_of_the_environment_is_hidden_though_nothing_in_its_shape_gives_it_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = "0123456789abcdef0123456789abcdef01234567"
    assert redact_text(f"logged in with {plain}") == f"logged in with {plain}"
    monkeypatch.setenv("WANDB_API_KEY", plain)
    assert redact_text(f"logged in with {plain}") == f"logged in with {REDACTED}"
    assert redact({"note": [plain]}) == {"note": [REDACTED]}


def test_user_names_and_home_folders_are_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, work = tmp_path / "home" / "somebody", tmp_path / "home" / "somebody" / "project"
    work.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.chdir(work)
    assert redact_text(f"{home}/models/a") == "~/models/a"
    assert redact_text(f"--out={work}/runs/1") == "--out=runs/1"
    assert redact(work) == "." and redact({"path": work / "a.json"}) == {"path": "a.json"}
    assert redact_text(f"{work}-other/x") == "~/project-other/x"
    assert (
        redact_text("/home/another/x and /Users/third/y and C:\\Users\\fourth\\z") == "~/x and ~/y and ~\\z"
    )
    assert redact_text("/scratch/somebody/models") == "/scratch/user/models"
    assert redact_text("somebody wrote this") == "somebody wrote this"
    assert portable_path("runs/1") == "runs/1" and portable_path("/data/models/m") == "m"
    assert portable_path(home / "models" / "m") == "m" and portable_path("..names") == "..names"


@given(st.text(alphabet=string.printable, max_size=200))
@settings(max_examples=150, deadline=None)
def test_redaction_twice_is_redaction_once_and_never_fails(text: str) -> None:
    once = redact_text(text)
    assert redact_text(once) == once


@pytest.mark.parametrize("part", ["9", "a-", "A.b_", "eyJ", "token", "authorization"])
def test_a_long_word_is_looked_through_once(part: str) -> None:
    """The time grows with the length, not with its square."""
    text = part * (30_000 // len(part))
    started = time.process_time()
    assert redact_text(text) == text
    assert time.process_time() - started < 2


def test_the_argument_is_left_as_it_was_and_sets_become_sorted_lists() -> None:
    value = {"token": "plain words", "languages": {"sw", "bn"}, "n": (1, 2.5, None)}
    assert redact(value) == {"token": REDACTED, "languages": ["bn", "sw"], "n": [1, 2.5, None]}
    assert value["token"] == "plain words" and os.environ.get("HOME")
