"""Takes secrets, user names and home folders out of whatever is about to be written to a file.

Three nets, because each has holes: names of settings that hold secrets (``hub_token``), shapes of well-known tokens
(``hf_...``), and the values that this process's own environment holds under such names, wherever they turn up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

REDACTED = "[redacted]"

_SECRET_WORD = (
    r"(?:token|key|apikey|secrets?|passwords?|passwd|passphrase|credentials?|authorization|cookies?|bearer)"
)
_SECRET_NAME = re.compile(
    rf"(^|[_\-.]){_SECRET_WORD}$|[_\-.]pwd$",  # a bare PWD is the working folder
    re.IGNORECASE,
)
_PASSWORD_NAME = re.compile(r"pass|pwd|secret", re.IGNORECASE)
_CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# Names that end like a secret's and hold a tokenizer's special tokens, or say by what rows are sorted.
_NOT_SECRET = re.compile(
    r"^(pad|eos|bos|unk|mask|sep|cls|stop|image|video|audio|special|begin|end|start|eot|eom|think"
    r"|decoder_start|forced_bos|forced_eos|sort|primary|foreign)[_\-](token|key)$",
    re.IGNORECASE,
)

# Whole tokens are taken without going back (`++`), and each pattern begins where it can only begin once in a word: a text
# of any kind takes time in proportion to its length.
_DATA_FILE = r"\.(?:jsonl?|csv|tsv|parquet|ya?ml|txt|md|safetensors|gguf)\b"
_PART = r"[A-Za-z0-9_\-]"  # of a JSON Web Token
_TOKEN_SHAPES = [
    re.compile(pattern)
    for pattern in (
        r"\bhf_[A-Za-z0-9]{12,}",  # Hugging Face
        r"\bapi_org_[A-Za-z0-9]{8,}",
        rf"\b(?:sk|pk)-[A-Za-z0-9_\-]{{16,}}+(?!{_DATA_FILE})",  # OpenAI, Anthropic, OpenRouter, ...
        r"\b(?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{8,}",  # Stripe
        r"\bgh[pousr]_[A-Za-z0-9]{16,}",  # GitHub
        r"\bgithub_pat_[A-Za-z0-9_]{16,}",
        r"\bglpat-[A-Za-z0-9_\-]{16,}",  # GitLab
        r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}\b",  # AWS
        r"\bAIza[A-Za-z0-9_\-]{30,}",  # Google
        r"\bya29\.[A-Za-z0-9_\-]{16,}",
        r"\bxox[abeprs]-[A-Za-z0-9\-]{10,}",  # Slack
        r"\bgsk_[A-Za-z0-9]{16,}",  # Groq
        r"\br8_[A-Za-z0-9]{16,}",  # Replicate
        r"\bnvapi-[A-Za-z0-9_\-]{16,}",  # NVIDIA
        r"\bxai-[A-Za-z0-9]{16,}",
        r"\bwandb_v1_[A-Za-z0-9_]{16,}",  # Weights & Biases
        r"\bpypi-[A-Za-z0-9_\-]{16,}",
        r"\bdapi[0-9a-f]{32}\b",  # Databricks
        rf"(?<!{_PART})(?={_PART}++\.{_PART}{{8,}}+\.)(?:[A-Za-z0-9_]*+-)*?eyJ{_PART}{{8,}}+\.{_PART}++\.{_PART}*+",
        r"(?s:-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z))",
    )
]
_BEARER = re.compile(
    r"(\bBearer\s+|\bAuthorization[\"']?\s*[=:]\s*[\"']?(?:Basic|Token|Bearer)\s+)(?=\S*\d)[A-Za-z0-9._~+/=\-]{12,}",
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
_ASSIGNMENT = re.compile(
    rf"""(?<![A-Za-z0-9_\-.])(?P<name>[A-Za-z0-9_\-.]*(?:{_SECRET_WORD}|[_\-.]pwd))"""
    r"""(?P<between>["']?\s*[=:]\s*["']?)(?P<value>[^\s"'&,;}\])]{4,})""",
    re.IGNORECASE,
)
_FROM_ENVIRONMENT = re.compile(r"\$\{?\w+\}?|env:\w+")
_HOME = re.compile(r"(?<![\w.])(?:/(?:home|Users)/[^/\s\"':,;]+|[A-Za-z]:[\\/]Users[\\/][^\\/\s\"':,;]+)")


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a secret: ``hub_token``, ``api-key``, ``apiKey``, ``WANDB_API_KEY``."""
    plain = _CAMEL_HUMP.sub("_", name.strip().lstrip("-"))
    return bool(_SECRET_NAME.search(plain)) and not _NOT_SECRET.search(plain)


def redact(value: Any) -> Any:
    """A copy of `value`, ready for JSON or YAML, without secrets, user names and home folders.

    Mappings, lists, tuples and sets are walked; paths become strings. Strings under a secret's name are replaced as
    a whole, unless they are empty or only name an environment variable (``${HF_TOKEN}``). Numbers, booleans and None
    stay, except numbers under a password's name. All other strings go through :func:`redact_text`.
    """
    return _redact(value, _environment_secrets())


def _redact(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {
            _redact_text(name, secrets) if isinstance(name, str) else name: (
                _hide(item, name)
                if isinstance(name, str) and is_secret_name(name)
                else _redact(item, secrets)
            )
            for name, item in value.items()
        }
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if isinstance(value, PurePath):
        return _redact_text(str(value), secrets)
    if isinstance(value, (list, tuple)):
        return _redact_sequence(value, secrets)
    if isinstance(value, (set, frozenset)):
        return sorted((_redact(item, secrets) for item in value), key=str)
    return value


def _redact_sequence(values: Iterable[Any], secrets: tuple[str, ...]) -> list[Any]:
    """A list may be a command line: what follows ``--hub_token`` in it is hidden."""
    out: list[Any] = []
    secret_flag: str | None = None
    for value in values:
        is_flag = isinstance(value, str) and value.startswith("-")
        hide = secret_flag is not None and not is_flag
        out.append(_hide(value, secret_flag or "") if hide else _redact(value, secrets))
        secret_flag = value if is_flag and is_secret_name(value) else None
    return out


def _hide(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return value if not value or _FROM_ENVIRONMENT.fullmatch(value) else REDACTED
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_hide(item, name) for item in value]
    if isinstance(value, Mapping):
        return {key: _hide(item, name) for key, item in value.items()}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and not _PASSWORD_NAME.search(name):
        return value
    return REDACTED


def redact_text(text: str) -> str:
    """`text` without tokens, URL logins, values of secret settings, user names and home folders.

    Paths below the working folder become relative to it, home folders become ``~``, and a path component that is the
    user's login name becomes ``user``.
    """
    return _redact_text(text, _environment_secrets())


def _redact_text(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    shown = text
    for shape in _TOKEN_SHAPES:
        shown = shape.sub(REDACTED, shown)
    if shown != text and not os.path.exists(text):  # files and folders may be called `sk-...`, too
        text = shown
    text = _BEARER.sub(rf"\1{REDACTED}", text)
    text = _URL_LOGIN.sub(f"{REDACTED}@", text)
    text = _ASSIGNMENT.sub(_hide_assignment, text)
    return _hide_paths(text)


def _hide_assignment(match: re.Match[str]) -> str:
    name, between, value = match["name"], match["between"], match["value"]
    if not is_secret_name(name) or _FROM_ENVIRONMENT.fullmatch(value) or value.startswith(REDACTED[:-1]):
        return match[0]
    if between.strip() == ":" and name.lower() in ("token", "key"):  # prose: "nats per token: all of them"
        return match[0]
    if name.lower() == "authorization" and value.lower() in ("basic", "bearer", "token"):
        return match[0]
    if _is_number(value) and not _PASSWORD_NAME.search(name):
        return match[0]
    return f"{name}{between}{REDACTED}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _hide_paths(text: str) -> str:
    end = r"(?=$|[/\\\s\"':,;])"
    folder = os.getcwd()
    if len(folder) > 1:
        text = "." if text == folder else re.sub(rf"(?<![\w.]){re.escape(folder)}{end}[/\\]?", "", text)
    home = os.path.expanduser("~")
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.]){re.escape(home)}{end}", "~", text)
    text = _HOME.sub("~", text)
    name = _login_name()
    if name:
        text = re.sub(rf"(?<=[/\\]){re.escape(name)}(?=$|[/\\\s\"':,;])", "user", text)
    return text


def portable_path(path: str | Path) -> str:
    """`path` as it may be shown to others: relative to the working folder where it lies below it, else its name."""
    absolute = os.path.abspath(os.path.expanduser(path))
    relative = os.path.relpath(absolute)
    if relative == os.curdir or not relative.startswith(os.pardir):
        return Path(relative).as_posix()
    return os.path.basename(absolute)


def _login_name() -> str | None:
    name = os.environ.get("USER") or os.environ.get("LOGNAME") or os.environ.get("USERNAME")
    return name if name and len(name) > 2 and name != "root" else None


def _environment_secrets() -> tuple[str, ...]:
    """Values of this process's secret-named variables, longest first so that no part of one is left over."""
    found = {value for name, value in os.environ.items() if len(value) >= 8 and is_secret_name(name)}
    return tuple(sorted(found, key=len, reverse=True))
