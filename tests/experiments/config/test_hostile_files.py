"""Whatever a file, an override or the environment holds: a configuration, or one ConfigurationError in a few lines."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz import settings
from hypothesis import given
from hypothesis import strategies as st

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.config.loading import load_experiments, parse_override
from fish_tuning.experiments.config.texts import text_problems, visible
from fish_tuning.experiments.config.yaml_files import parse

BASE = "model: {name: m}\ndataset: {load_args: [d]}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)
REFUSED = {
    "a date": "seeds: 2024-01-01",
    "no date": "seeds: 2024-13-45",
    "no number": "seeds: !!int x",
    "no float": "lora: {dropout: !!float x}",
    "no truth value": "seeds: !!bool maybe",
    "a timestamp": "seeds: !!timestamp x",
    "a Python object": "seeds: !!python/object/apply:os.system [ls]",
    "many digits": "seeds: " + "9" * 10_000,
    "many hexadecimal digits": "seeds: 0x" + "f" * 20_000,
    "an endless number": "training: {learning_rates: [1e999]}",
    "deep lists": "lora: " + "[" * 3000 + "]" * 3000,
    "deep mappings": "lora: " + "{a: " * 3000 + "1" + "}" * 3000,
    "a list in itself": "lora: &a [*a]",
    "a mapping in itself": "lora: &a {x: *a}",
    "a bomb of aliases": BOMB,
    "a long path": "model: {name: " + "a" * 300 + "}",
    "a long text": "name: " + "a/" * 3000,
    "a quota that is no number": "fish_tuning: {quotas: {a: .nan}}",
    "an endless quota": "fish_tuning: {quotas: {a: .inf, b: -.inf}}",
    "a ratio that is no number": "protocol: fixed_layers\nfish_tuning: {keep_ratio: [.nan]}",
    "a zero byte": 'name: "a\\0b"',
    "an escape code": 'name: "a\\e[31mb"',
    "text that runs backwards": 'name: "a\\u202eb"',
    "half a pair": 'name: "\\ud800"',
    "a key that is a number": "1: x",
    "a key that is null": "null: x",
    "a key that is a list": "? [a]\n: b",
    "bytes": "name: !!binary aGVsbG8=",
    "a set": "seeds: !!set {1, 2}",
    "no ordered mapping": "lora: !!omap 3",
    "a merge of nothing": "lora: {<<: 3}",
    "two documents": "---\na: 1",
    "a tab": "\tname: x",
    "a bell": "name: \x07",
    "no character": 'name: "\\UFFFFFFFF"',
    "a version of many digits": f"...\n%YAML {'1' * 5_000}.1\n---\na: 1",
    "an endless argument": "training: {args_override: {max_grad_norm: .inf}}",
    "an argument that is no number": "training: {args_override: {learning_rate: .nan}}",
    "one ratio twice": "protocol: fixed_layers\nfish_tuning: {keep_ratio: [0.1, 0.10]}",
    "variables without an end": "name: " + "${a:-" * 10_000,
    "a key of several lines": '"a\\nb": 1',
    "a long key": "? " + "k" * 900 + "\n: 1",
    "numbers that are none, deep down": "model: {name: m, config_overrides: {a: [.nan]}}",
    "a key twice": "lora: {dropout: 0.1, dropout: 0.2}",
    "a folder above": "name: ..",
    "a hidden folder": "name: .x",
    "a path as a name": "name: a/../../b",
    "a long name": "name: " + "a" * 200,
    "a mapping as a method": "peft: {method: {a: 1}}",
    "lists of lists as methods": "peft: [[1]]",
    "a number as a section": "training: 3",
    "numbers as data sets": "dataset: [1, 2]",
}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(text: str, *overrides: str) -> Any:
        file = tmp_path / "hostile.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        return load_experiments(file, overrides)

    return load


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_one_error_in_a_few_lines(what: str, load: Any) -> None:
    began = time.monotonic()
    base = "\n".join(line for line in BASE.splitlines() if line.partition(":")[0] not in REFUSED[what])
    with pytest.raises(ConfigurationError) as error:
        load(f"{base}\n{REFUSED[what]}\n")
    assert len(str(error.value).splitlines()) <= 4
    assert all(len(line) < 700 for line in str(error.value).splitlines())
    assert visible(str(error.value)) == str(error.value)
    assert time.monotonic() - began < 20


def test_a_long_file_is_refused(load: Any) -> None:
    with pytest.raises(ConfigurationError, match="longer than the 256 KiB"):
        load(BASE + "#" * 300_000)


def test_dates_and_marks_of_order_are_texts(load: Any) -> None:
    assert load("\ufeff" + BASE + "name: 2024-01-01")[0].name == "2024-01-01"


def test_whole_numbers_are_those_of_yaml_1_2(load: Any) -> None:
    assert load(BASE + "lora: {fish_rank: 010, baseline_rank: 0x1F}")[0].lora.fish_rank == 10
    assert load(BASE + "lora: {baseline_rank: 0x1F}")[0].lora.baseline_rank == 31
    with pytest.raises(ConfigurationError, match=r"seeds='1:30'"):
        load(BASE + "seeds: 1:30")


def test_a_variable_leads_out_of_no_folder(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UP", "../../etc")
    with pytest.raises(ConfigurationError, match="a variable's value leads to a folder above"):
        load(BASE + "training: {output_dir: 'results/${UP}'}")
    assert load(BASE + "training: {output_dir: '${UP}'}")[0].training.output_dir == "../../etc"  # it is the user's own


@pytest.mark.parametrize("budget", ["topx", "top\u00b2", "top" + "9" * 5000, "top-1", "top"])
def test_a_budget_that_is_none_names_no_layers(budget: str) -> None:
    assert ArmName.parse(f"lora@{budget}").top_layers is None


def test_folders_of_data_sets_stay_below(load: Any) -> None:
    for name in ("..", "../..", "/", "a/.hidden", "."):
        (experiment,) = load(f"model: {{name: m}}\ndataset: [{{load_args: ['{name}']}}]")
        folder = Path(experiment.training.output_dir)
        assert folder.parent == Path("results/hostile")
        assert folder.name not in ("", ".", "..")
        assert not folder.name.startswith(".")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    *("name", "model", "dataset", "peft", "protocol", "lora", "fish_tuning", "training", "seeds", "model.name"),
    *("model.config_overrides", "dataset.load_args", "dataset.data_files", "dataset.task", "dataset.validation_split"),
    *("peft.method", "peft.args", "lora.target_modules", "lora.names_to_exclude", "lora.init_lora_weights"),
    *("fish_tuning.methods_to_run", "fish_tuning.keep_ratio", "fish_tuning.top_layers", "fish_tuning.quotas"),
    *("fish_tuning.score", "training.args_override", "training.learning_rates", "training.output_dir"),
)


@settings()
@given(text=st.text(max_size=60))
def test_any_text_is_a_value_or_one_error(text: str) -> None:
    with suppress(ConfigurationError):
        parse(text, "text")


@settings()
@given(text=st.text(alphabet="[]{}&*!:-?|>'\"#%@`,. \nab01~<=", max_size=40))
def test_any_signs_of_yaml_are_a_value_or_one_error(text: str) -> None:
    with suppress(ConfigurationError):
        parse(text, "text")


@settings()
@given(key=st.sampled_from(KEYS), value=ANYTHING)
def test_any_value_of_any_key_is_an_experiment_or_one_error(
    key: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("hostile") / "file.yaml"
    file.write_text(BASE)
    try:
        written = yaml.safe_dump(value, default_flow_style=True).partition("\n...")[0].replace("\n", " ")
    except UnicodeEncodeError:
        return
    with suppress(ConfigurationError):
        load_experiments(file, [f"{key}={written}"])


@settings()
@given(text=st.text(max_size=40))
def test_any_override_is_read_or_one_error(text: str) -> None:
    with suppress(ConfigurationError):
        parse_override(text)


@settings()
@given(text=st.text(max_size=30))
def test_any_arm_name_has_parts(text: str) -> None:
    name = ArmName.parse(text)
    assert str(ArmName.parse(str(name))) == str(name)


def test_problems_name_their_keys() -> None:
    assert list(text_problems({"a": {"b": ["x\x1b[0m"]}})) == [
        r"a.b holds the control character \x1b, which no text here needs."
    ]
    assert visible("plain\n\ttext") == "plain\n\ttext"
