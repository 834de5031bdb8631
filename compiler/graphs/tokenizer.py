# SPDX-License-Identifier: Apache-2.0
"""A pipeline's tokenizer as a graph: text → token ids, cleaned as Wan's pipeline cleans prompts.

The graph is proved against the tokenizer itself on texts of many scripts before it is carried.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...bundle.manifest import TokenizerEntry
from ...engines.openvino_tokenizer import write_tokenizer

__all__ = ["PROBES", "TOKENIZER", "bring_tokenizer"]

TOKENIZER = "tokenizer/model.xml"
"""Where the graph lies in a bundle."""

# Characters themselves, not escapes: the graph's regular expressions know other ones.
SPACES = "[\t\n\x0c\r \x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
CONTROLS = "[\x01-\x08\x0b\x0e-\x1b\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"

CLEANING = (
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&quot;", '"'),
    ("&#39;", "'"),
    ("&nbsp;", " "),
    ("&amp;", "&"),
    ("[\u02bc\u2018-\u201b]", "'"),
    ("[\u201c-\u201f]", '"'),
    (CONTROLS, ""),
    (SPACES, " "),
)
"""Pattern → what takes its place, in order: of what ``ftfy`` and ``html.unescape`` do, all that does
not need a look at the whole text. Text that was decoded wrongly is not repaired."""

PROBES = (
    "",
    "a red circle moving right on a gray background",
    "Two anthropomorphic cats in comfy boxing gear fight intensely on a spotlighted stage!",
    "  spaces,\ttabs\nand lines\u00a0\u3000 ",
    "\u201ccurly\u201d \u2018quotes\u2019 \u2026 it\u2019s A&amp;B",
    "na\u00efve caf\u00e9 \u2013 3.5 \u00d7 2 = 7 (50%)",
    "e\u0301 combined, \ufb01 ligature, \uff21 wide",
    "\u4e00\u53ea\u7ea2\u8272\u7684\u732b",
    "\u043a\u043e\u0448\u043a\u0430",
    "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621",
    "\u65e5\u672c\u8a9e\u306e\u732b",
    "\U0001f3ac \U0001f680",
    "C++ under_score <b> #1; a/b\\c",
    "a" * 300,
    "word " * 600,
)
"""Texts on which the graph has to agree with the tokenizer."""


def bring_tokenizer(pipeline: Path, folder: Path) -> tuple[TokenizerEntry | None, str | None]:
    """Write the tokenizer of a Wan pipeline into a bundle, if its graph gives the same ids.

    Args:
        pipeline: Diffusers folder; its ``tokenizer`` is read.
        folder: The bundle's.

    Returns:
        The manifest's entry and None, or None and why the bundle takes token ids alone.
    """
    from transformers import AutoTokenizer

    if not (pipeline / "tokenizer").is_dir():
        return None, _without("the pipeline has no tokenizer")
    tokenizer, changed = (
        AutoTokenizer.from_pretrained(pipeline / "tokenizer", local_files_only=True) for _ in "12"
    )
    if not getattr(changed, "is_fast", False):
        return None, _without("the pipeline's tokenizer has no fast form")
    described = json.loads(changed.backend_tokenizer.to_str())
    _clean_first(changed.backend_tokenizer)
    file = folder / TOKENIZER
    file.parent.mkdir()
    try:
        ids_of = write_tokenizer(changed, file)
    except ImportError:
        _remove(file)
        return None, _without("the package openvino-tokenizers is missing: pip install it")
    except Exception as error:  # of a converter that promises no class
        _remove(file)
        return None, _without(f"openvino-tokenizers can't convert it: {error}")
    # The converted Unigram model knows no bytes in place of unknown characters.
    unknown = tokenizer.unk_token_id if described["model"].get("byte_fallback") else None
    for text in PROBES:
        found, expected = ids_of(text), _ids(tokenizer, text)
        is_refused = unknown in found and _has_bytes(tokenizer, expected)
        if found != expected and not is_refused:
            _remove(file)
            return None, _without(f"its graph gives other ids than it does for {text[:40]!r}")
    return TokenizerEntry(file=TOKENIZER, unknown=unknown), None


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids that Wan's pipeline makes of a prompt."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return list(tokenizer(prompt_clean(text), add_special_tokens=True, verbose=False).input_ids)


def _has_bytes(tokenizer: Any, ids: list[int]) -> bool:
    """Tell whether bytes stand among token ids for a character that is none of the vocabulary."""
    return any(token.startswith("<0x") for token in tokenizer.convert_ids_to_tokens(ids))


def _clean_first(tokenizer: Any) -> None:
    """Put the cleaning of prompts before a tokenizer's own normalizer."""
    from tokenizers import Regex, normalizers

    own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    cleaning = [normalizers.Replace(Regex(pattern), text) for pattern, text in CLEANING]
    tokenizer.normalizer = normalizers.Sequence([*cleaning, normalizers.Strip(), *own])


def _without(why: str) -> str:
    return f"programs without Python take prompts as token ids, not as text: {why}"


def _remove(file: Path) -> None:
    for each in (file, file.with_suffix(".bin")):
        each.unlink(missing_ok=True)
    file.parent.rmdir()
