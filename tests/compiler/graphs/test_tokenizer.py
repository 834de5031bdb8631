"""The tokenizer's graph against the tokenizer and the cleaning of Wan's pipeline."""

import json
import shutil

import pytest

pytest.importorskip("openvino_tokenizers", reason="needs openvino-tokenizers")

import openvino
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from freewheel.bundle.manifest import TokenizerEntry
from freewheel.compiler.graphs import tokenizer as graph
from freewheel.compiler.graphs.tokenizer import PROBES, TOKENIZER, bring_tokenizer

pytestmark = pytest.mark.openvino

UNKNOWN, BYTES = 2, 256

TEXTS = (
    "A cat walks on the grass, realistic style.",
    "cat \u201ccat\u201d  cat&amp;cat\u2019s",
    "CAT (cat) cat: cat; 12 cats?",
    "\u00a0cat\tcat\r\n",
    "x" * 2000,
)
"""Beside the probes: what a graph that was proved on those is asked."""


def unigram(**changes):
    """A tokenizer of umt5's form: Unigram over normalised words, bytes for what it lacks."""
    letters = [
        *"abcdefghijklmnopqrstuvwxyzACT,.!?:;()&'\"0123456789-/",
        "cat",
        "\u2581cat",
        "\u2581",
    ]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(BYTES)]
    pieces += [(piece, -2.0 - index / 10) for index, piece in enumerate(letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def save(tokenizer, folder):
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=512,
    )
    wrapped.save_pretrained(folder / "tokenizer")


def both(pipeline, bundle):
    """Return what the written graph and the pipeline's tokenizer make of a text."""
    core = openvino.Core()
    compiled = core.compile_model(str(bundle / TOKENIZER), "CPU")
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "tokenizer")
    return (
        lambda text: [int(i) for i in compiled([text])["input_ids"][0]],
        lambda text: tokenizer(prompt_clean(text), verbose=False).input_ids,
    )


def test_the_demos_graph_gives_the_pipelines_ids(repository, tmp_path):
    pipeline = repository / "models" / "shapes_wan"
    entry, why_not = bring_tokenizer(pipeline, tmp_path)
    assert (entry, why_not) == (TokenizerEntry(file=TOKENIZER), None)
    found, expected = both(pipeline, tmp_path)
    for text in (*TEXTS, "a red  circle moving\nright on a gray background"):
        assert found(text) == expected(text), text


def test_bytes_for_unknown_characters_are_told_apart(tmp_path):
    save(unigram(), tmp_path / "pipe")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    entry, why_not = bring_tokenizer(tmp_path / "pipe", bundle)
    assert (entry, why_not) == (TokenizerEntry(file=TOKENIZER, unknown=UNKNOWN), None)
    found, expected = both(tmp_path / "pipe", bundle)
    assert all(found(text) == expected(text) and UNKNOWN not in found(text) for text in TEXTS)
    whale = "cat \U0001f433"
    assert UNKNOWN in found(whale)
    assert UNKNOWN not in expected(whale)
    assert len(found("cat " * 700)) == 701, "nothing is cut"


def test_what_can_not_be_proved_is_not_carried(tmp_path, monkeypatch):
    bundle = tmp_path / "bundle"
    bundle.mkdir()

    def why_not(pipeline):
        entry, why = bring_tokenizer(pipeline, bundle)
        assert entry is None
        assert not list(bundle.iterdir()), "nothing half-written"
        return why

    (tmp_path / "none").mkdir()
    assert "the pipeline has no tokenizer" in why_not(tmp_path / "none")
    save(unigram(pre_tokenizer=pre_tokenizers.UnicodeScripts()), tmp_path / "scripts")
    assert "openvino-tokenizers can't convert it" in why_not(tmp_path / "scripts")
    save(unigram(), tmp_path / "pipe")
    monkeypatch.setattr(graph, "CLEANING", graph.CLEANING[:-4])
    assert "gives other ids than it does for" in why_not(tmp_path / "pipe")


def test_the_probes_need_the_cleaning():
    assert sum(prompt_clean(text) != text for text in PROBES) >= 3


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    save(unigram(), tmp_path / "pipe")
    monkeypatch.setitem(__import__("sys").modules, "openvino_tokenizers", None)
    entry, why_not = bring_tokenizer(tmp_path / "pipe", tmp_path)
    assert entry is None
    assert "pip install" in why_not


def test_a_described_tokenizer_is_read_again(tmp_path):
    """The file, not what this process holds, decides about bytes."""
    save(unigram(), tmp_path / "pipe")
    stored = json.loads((tmp_path / "pipe/tokenizer/tokenizer.json").read_text())
    stored["model"]["byte_fallback"] = False
    (tmp_path / "pipe/tokenizer/tokenizer.json").write_text(json.dumps(stored))
    shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
    (tmp_path / "bundle").mkdir()
    entry, why_not = bring_tokenizer(tmp_path / "pipe", tmp_path / "bundle")
    assert why_not is None
    assert entry.unknown is None, "an unknown character is <unk> to both"
