"""Names of models and adapters: a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ngeval.errors import NgevalError, TaskError
from ngeval.utils.optional import optional_module
from ngeval.utils.text import first_line

HUB_NAME = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_name(name: str, what: str) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` for a folder, or for a name on the hub."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return {"pretrained_model_name_or_path": path, "local_files_only": True}
    if os.path.exists(path):
        raise TaskError(f"{what} {name!r} is a file; give the folder that holds it")
    if not HUB_NAME.fullmatch(name):
        raise TaskError(
            f"{what} {name!r}: there is no such folder, and it cannot be a name on the hub"
        )
    return {"pretrained_model_name_or_path": name, "local_files_only": not hub_is_reachable()}


@contextlib.contextmanager
def loading(name: str, what: str) -> Iterator[None]:
    """Turn any error of the Hugging Face libraries into a `TaskError` that says what to do."""
    try:
        yield
    except NgevalError:
        raise
    except Exception as error:  # the libraries can raise anything
        raise TaskError(_advice(name, what, error)) from error


def _advice(name: str, what: str, error: Exception) -> str:
    text = first_line(error, 300)
    if "trust_remote_code" in str(error):
        return (
            f"{what} {name!r} asks to run Python code from its repository, which was refused; pass "
            "--trust-remote-code (trust_remote_code=True) if you trust its source"
        )
    if os.path.exists(os.path.expanduser(name)):
        return f"{what} in {name!r} cannot be loaded: {type(error).__name__}: {text}"
    near = Path(name).parent
    if near != Path() and os.path.isdir(near):  # more likely a misspelt folder
        names = ", ".join(sorted(path.name for path in near.iterdir())[:8])
        return f"{what} {name!r} does not exist; {near} holds {names or 'nothing'}"
    if not hub_is_reachable():
        return (
            f"{what} {name!r} is neither a folder nor in the local cache, and the hub cannot be "
            f"reached (no network?); download it where there is one (hf download {name} "
            "--local-dir FOLDER) and give that folder"
        )
    return f"{what} {name!r} cannot be loaded from the hub: {type(error).__name__}: {text}"


def adapter_folder(name: str) -> str:
    """A folder or glob as it is; a name on the hub as the folder that it is downloaded to."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or os.path.exists(name):
        return name
    with loading(name, "adapter"):
        folder: str = optional_module("huggingface_hub").snapshot_download(
            name, allow_patterns=["adapter_*"], local_files_only=not hub_is_reachable()
        )
    return folder


@cache
def hub_is_reachable() -> bool:
    """Whether the hub's name resolves; without a network, its client would wait for long."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if any(os.environ.get(f"{word}_proxy") for word in ("https", "HTTPS", "all", "ALL")):
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True
