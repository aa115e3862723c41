"""Models that carry their code: loaded without the package, from folders and from a Hub on this machine."""

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import modeling_nanodeepseek
from modeling_nanodeepseek import NanoDeepSeekConfig, NanoDeepSeekForCausalLM, NanoDeepSeekForSequenceClassification
from modeling_nanodeepseek.licence import APACHE_2_0
from modeling_nanodeepseek.remote_code import AUTO_MAP, LICENSE, code_files
from tests.conftest import SPARSE, assert_same, tiny_config, tiny_model, tokens
from tests.hub_server import USER, serving
from tests.small_run import small_tokenizer
from train import pretrain

LIBRARY = Path(modeling_nanodeepseek.__file__).parent
CODE = {path.name for path in code_files()}

# Both ways into a package are closed: installed for development or not, it is not there for this process.
WITHOUT_PACKAGE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_nanodeepseek", "train", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

absent = Absent()
sys.meta_path.insert(0, absent)
try:
    import modeling_nanodeepseek
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package is there")
"""

PREAMBLE = """
import os, sys, torch
from pathlib import Path
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
)
torch.set_num_threads(1)
here = Path(sys.argv[1])

def refusal(call, *words):
    try:
        call()
    except (OSError, ValueError) as error:
        assert all(word in str(error) for word in words), (str(error), words)
        return
    raise AssertionError(f"was not refused: {words}")

def same(model, expected, **inputs):
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
"""


def in_a_process(script: str, folder: Path, package: bool = False, environment: dict | None = None) -> str:
    """Runs a script in a process that starts in the empty `folder/work`, by default without the package."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    environment = environment or os.environ | {"HF_HOME": str(folder / "home")}
    environment = environment | {"PYTHONPATH": str(LIBRARY.parent) if package else "", "TQDM_DISABLE": "1"}
    program = ("" if package else WITHOUT_PACKAGE) + PREAMBLE + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def sabotage(folder: Path, witness: Path):
    """Every file of code leaves a trace when it runs."""
    (folder / "custom_generate").mkdir(exist_ok=True)
    for file in [*folder.glob("*.py"), folder / "custom_generate" / "generate.py"]:
        file.write_text(f"open({str(witness)!r}, 'a').write(__file__)\n")


# -- what lies in the folder ---------------------------------------------------------------------------------------


def test_the_folder_holds_all_that_the_model_is_made_of(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert all((tmp_path / name).read_bytes() == (LIBRARY / name).read_bytes() for name in CODE)
    beside = {"__init__", "export", "adapters", "trainers"}  # what is done with a model; no part of one
    modules = {path.stem for path in LIBRARY.glob("*.py")} - beside
    assert {Path(name).stem for name in CODE} == modules  # none is missing from the package either
    for name in CODE:
        for node in ast.walk(ast.parse((tmp_path / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in CODE, (name, node.module)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                imported = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not {module.split(".")[0] for module in imported} & {*modules, LIBRARY.name}, name


def test_the_code_goes_with_its_licence(tmp_path):
    """As a file of its own, for the weights' licence may be another; wherever the package is installed from."""
    assert APACHE_2_0 == (LIBRARY.parent / "LICENSE").read_text()
    (tmp_path / "LICENSE").write_text("of the weights")
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / LICENSE).read_text() == APACHE_2_0 and (tmp_path / "LICENSE").read_text() == "of the weights"


def test_the_map_names_what_the_package_registers(tmp_path):
    config = tiny_config()
    tiny_model().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    classes = {"AutoConfig": NanoDeepSeekConfig}
    for auto in (
        AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
    ):  # fmt: skip
        classes[auto.__name__] = auto._model_mapping[type(config)]
    assert {auto: f"{c.__module__.split('.')[-1]}.{c.__name__}" for auto, c in classes.items()} == AUTO_MAP


def test_what_others_wrote_into_the_map(tmp_path):
    """Entries for our classes are ours, wherever the model was loaded from; others stay."""
    model = tiny_model()
    model.config.auto_map = {
        "AutoModelForCausalLM": "someone/elsewhere--modeling_nanodeepseek.NanoDeepSeekForCausalLM",
        "AutoTokenizer": ["tokenization_mine.Mine", None],
    }
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved == AUTO_MAP | {"AutoTokenizer": ["tokenization_mine.Mine", None]}


def test_a_class_that_fsdp_made_is_saved_as_the_model(tmp_path, monkeypatch):
    """`fully_shard` makes the model's class anew, in a module of torch's: that is not the model's code."""
    monkeypatch.setattr(NanoDeepSeekForCausalLM, "_auto_class", "AutoModelForCausalLM")  # as when loaded from a folder
    assert NanoDeepSeekForCausalLM.is_remote_code()
    model = tiny_model()
    module = "torch.distributed.fsdp._fully_shard._fully_shard"
    model.__class__ = type("FSDPNanoDeepSeekForCausalLM", (NanoDeepSeekForCausalLM,), {"__module__": module})
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and config["architectures"] == ["NanoDeepSeekForCausalLM"]


def test_an_adapter_alone_carries_no_code(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(target_modules=["o_proj"], r=2))
    model.save_pretrained(tmp_path)
    assert "adapter_config.json" in os.listdir(tmp_path) and not list(tmp_path.glob("*.py"))


def test_a_checkpoint_of_a_run_carries_it(tiny_recipe, tmp_path):
    """Written aside and renamed; and a pipeline of transformers alone speaks from it."""
    pretrain.run(tiny_recipe(trainer={"max_steps": 2, "save_strategy": "steps", "save_steps": 2}))
    checkpoint = tmp_path / "moved" / "elsewhere"
    checkpoint.parent.mkdir()
    shutil.move(tmp_path / "run" / "checkpoint-2", checkpoint)
    assert {path.name for path in checkpoint.glob("*.py")} == CODE
    shutil.rmtree(tmp_path / "run")
    script = """
    write = pipeline("text-generation", model=str(here / "moved" / "elsewhere"), trust_remote_code=True)
    assert type(write.model).__module__.startswith("transformers_modules."), type(write.model)
    text = write("the quick", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("the quick") and len(text) > len("the quick")
    """
    printed = in_a_process(script, tmp_path)
    assert "not supported" not in printed


# -- without the package -------------------------------------------------------------------------------------------


def test_three_generations_without_the_package(tmp_path):
    """Saved here, loaded there, saved there, loaded in another process, saved again, loaded here; each time moved."""
    first, ids = tmp_path / "first", tokens()
    model = tiny_model(num_nextn_predict_layers=1, **SPARSE)
    model.save_pretrained(first)
    expected = model(ids).logits.detach()
    drafted = model.generate(ids[:1], max_new_tokens=6, do_sample=False, use_mtp=True)
    torch.save({"ids": ids, "logits": expected, "text": drafted}, tmp_path / "expected.pt")
    (tmp_path / "a").mkdir()
    shutil.move(first, tmp_path / "a" / "my.model-1")
    script = """
    told = torch.load(here / "expected.pt")
    ids = told["ids"]
    refusal(lambda: AutoModelForCausalLM.from_pretrained(here / "a" / "my.model-1"), "trust_remote_code=True")
    assert not (here / "home" / "modules").exists() and "transformers_modules" not in sys.modules
    model, info = AutoModelForCausalLM.from_pretrained(
        str(here / "a" / "my.model-1"), trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    same(model, told["logits"], input_ids=ids)
    text = model.generate(ids[:1], max_new_tokens=6, do_sample=False, use_mtp=True)
    assert torch.equal(text, told["text"]) and model.draft_report.steps > 0

    base = AutoModel.from_pretrained(here / "a" / "my.model-1", trust_remote_code=True)
    assert type(base).__name__ == "NanoDeepSeekModel" and base.layers[1].self_attn.indexer is not None
    with torch.no_grad():
        logits = model.lm_head(base(ids).last_hidden_state)
    torch.testing.assert_close(logits, told["logits"], rtol=0, atol=1e-5)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        here / "a" / "my.model-1", trust_remote_code=True, num_labels=3
    )
    assert torch.equal(classifier.model.norm.weight, model.model.norm.weight)
    model.save_pretrained(here / "b" / "second")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    output = model.train()(input_ids=ids, labels=ids)
    assert all(term is not None for term in (output.balance_loss, output.index_loss, output.mtp_loss))
    output.loss.backward()
    optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still, still
    assert model.update_expert_bias(gamma=0.001).tokens.sum() > 0
    """
    in_a_process(script, tmp_path)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "c").mkdir()
    shutil.move(tmp_path / "b" / "second", tmp_path / "c" / "again")
    script = """
    told = torch.load(here / "expected.pt")
    model = AutoModelForCausalLM.from_pretrained(here / "c" / "again", trust_remote_code=True)
    same(model, told["logits"], input_ids=told["ids"])
    model.save_pretrained(here / "third", max_shard_size="100KB")
    AutoModelForSequenceClassification.from_config(model.config, trust_remote_code=True).save_pretrained(here / "head")
    """
    in_a_process(script, tmp_path)
    third = tmp_path / "third"
    assert {path.name for path in third.glob("*.py")} == CODE and len(list(third.glob("*.safetensors"))) > 1
    assert (third / LICENSE).read_text() == APACHE_2_0
    assert (third / "modeling_nanodeepseek.py").read_bytes() == (LIBRARY / "modeling_nanodeepseek.py").read_bytes()
    assert_same(NanoDeepSeekForCausalLM.from_pretrained(third)(ids).logits, expected)
    assert isinstance(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "head"), NanoDeepSeekForSequenceClassification
    )


def test_installed_code_wins_and_none_runs_from_the_folder(tmp_path, monkeypatch):
    """With and without trust_remote_code, and nobody is asked."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    sabotage(tmp_path / "model", tmp_path / "ran")
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        for auto in (AutoModelForCausalLM, AutoModel, AutoModelForTokenClassification):
            if trust.get("trust_remote_code"):  # transformers then takes a text generation strategy from there
                shutil.rmtree(tmp_path / "model" / "custom_generate", ignore_errors=True)
            loaded = auto.from_pretrained(tmp_path / "model", **trust)
            assert type(loaded).__module__ == "modeling_nanodeepseek.modeling_nanodeepseek"
        assert type(AutoConfig.from_pretrained(tmp_path / "model", **trust)) is NanoDeepSeekConfig
    assert not (tmp_path / "ran").exists()


def test_the_copy_beside_the_package(tmp_path):
    """The copy first and the package after it, and the copy anew: each registers, none disturbs the other."""
    model, ids = tiny_model(), tokens()
    model.save_pretrained(tmp_path / "model")
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "expected.pt")
    script = f"""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    told = torch.load(here / "expected.pt")
    copy = AutoModelForCausalLM.from_pretrained(here / "model", trust_remote_code=True)
    sys.meta_path.remove(absent)
    sys.path.insert(0, {str(LIBRARY.parent)!r})
    import modeling_nanodeepseek
    installed = AutoModelForCausalLM.from_pretrained(here / "model")
    assert type(installed) is modeling_nanodeepseek.NanoDeepSeekForCausalLM
    name = "modeling_nanodeepseek.NanoDeepSeekForCausalLM"
    again = get_class_from_dynamic_module(name, str(here / "model"), force_download=True)
    assert type(copy).__module__.startswith("transformers_modules") and again is not type(copy)
    for number, cls in enumerate((type(copy), type(installed), again)):
        model, info = cls.from_pretrained(here / "model", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        same(model, told["logits"], input_ids=told["ids"])
        assert model.generate(told["ids"], max_new_tokens=2).shape == (2, 33)
        model.save_pretrained(here / f"saved-{{number}}")
        same(AutoModelForCausalLM.from_pretrained(here / f"saved-{{number}}"), told["logits"], input_ids=told["ids"])
    """
    in_a_process(script, tmp_path)


# -- a Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    with serving() as hub:
        yield hub


CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# What a run wrote"
OTHER_CARD = "---\nlicense: mit\n---\n\n# What somebody wrote"


def complete(files: dict[str, bytes]) -> bool:
    """Whether the code that config.json names is there, and its licence."""
    return "config.json" not in files or CODE | {LICENSE} <= files.keys()


def test_pushed_and_loaded_without_the_package(hub, tmp_path):
    model, ids, tokenizer = tiny_model(num_nextn_predict_layers=1), tokens(), small_tokenizer()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(CARD)
    hub.commit("someone/carded", "a card", {"README.md": OTHER_CARD.encode()})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "expected.pt")
    push = """
    import modeling_nanodeepseek
    model = AutoModelForCausalLM.from_pretrained(here / "model")
    model.push_to_hub("someone/pushed", max_shard_size="100KB")
    AutoTokenizer.from_pretrained(here / "tokenizer").push_to_hub("someone/pushed")
    model.config.push_to_hub("someone/pushed")
    model.save_pretrained(here / "saved", push_to_hub=True, repo_id="someone/saved")
    model.push_to_hub("someone/carded")
    """
    in_a_process(push, tmp_path, package=True, environment=hub.environment(tmp_path / "home-of-one"))
    assert not hub.unknown
    for name in ("pushed", "saved"):
        assert all(complete(commit.files) for commit in hub.repositories[f"{USER}/{name}"]), name
        assert json.loads(hub.files(f"{USER}/{name}")["config.json"])["auto_map"] == AUTO_MAP
    assert len([file for file in hub.files(f"{USER}/pushed") if file.endswith(".safetensors")]) > 1
    assert "model.safetensors" in hub.files(f"{USER}/saved") and "tokenizer.json" in hub.files(f"{USER}/pushed")
    for name in ("pushed", "saved"):  # the card beside the weights, and not where there is one already
        assert hub.files(f"{USER}/{name}")["README.md"].decode() == CARD
    assert hub.files(f"{USER}/carded")["README.md"].decode() == OTHER_CARD

    pushed, saved = hub.files(f"{USER}/pushed"), hub.files(f"{USER}/saved")
    first = hub.repositories[f"{USER}/pushed"][-1].oid
    shard = next(file for file in pushed if file.startswith("model-00002"))
    hub.commit("someone/torn", "a shard is missing", pushed | {shard: None})
    hub.commit("someone/cut", "a shard was cut short", pushed | {shard: pushed[shard][:-9]})
    less = save({"lm_head.weight": torch.zeros(97, 40)}, metadata={"format": "pt"})
    hub.commit("someone/less", "tensors are missing", saved | {"model.safetensors": less})
    pull = f"""
    told = torch.load(here / "expected.pt")
    refusal(lambda: AutoModelForCausalLM.from_pretrained("someone/pushed"), "trust_remote_code=True")
    assert len(AutoTokenizer.from_pretrained("someone/pushed")) == {len(tokenizer)}  # needs none of the code
    assert "transformers_modules" not in sys.modules
    model = AutoModelForCausalLM.from_pretrained("someone/pushed", trust_remote_code=True)
    same(model, told["logits"], input_ids=told["ids"])
    text = model.generate(told["ids"][:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(text, model.generate(told["ids"][:1], max_new_tokens=4, do_sample=False, use_mtp=True))
    model.save_pretrained(here / "again")
    fixed = AutoModelForCausalLM.from_pretrained("someone/pushed", trust_remote_code=True, revision={first!r})
    same(fixed, told["logits"], input_ids=told["ids"])
    assert len(AutoTokenizer.from_pretrained("someone/pushed", trust_remote_code=True)) == {len(tokenizer)}

    def load(name, **arguments):
        return lambda: AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **arguments)

    refusal(load("someone/pushed", revision="v9"), "v9", "not a valid git identifier")
    refusal(load("someone/nothing"), "someone/nothing", "not a")
    refusal(load("someone/torn"), {shard!r}, "does not appear to have")
    refusal(load("someone/cut"), {shard!r}, "no complete safetensors file")
    refusal(load("someone/less"), "someone/less", "is missing", "not those of its config")
    """
    in_a_process(pull, tmp_path, environment=hub.environment(tmp_path / "home-of-two"))
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == CODE
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == AUTO_MAP  # not the repository's


def test_a_run_that_pushes(hub, tiny_recipe, tmp_path):
    """Checkpoints on the way are uploaded with their code, and the end with its card, in one process."""
    trainer = {"push_to_hub": True, "hub_model_id": "someone/run", "save_strategy": "steps", "save_steps": 2}
    recipe = tiny_recipe(trainer=trainer | {"max_steps": 4, "hub_strategy": "every_save", "hub_always_push": True})
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    script = """
    from train import pretrain
    from train.recipe import Recipe
    pretrain.run(Recipe.model_validate_json((here / "recipe.json").read_text()))
    """
    in_a_process(script, tmp_path, package=True, environment=hub.environment(tmp_path / "home"))
    commits = hub.repositories[f"{USER}/run"]
    assert len(commits) >= 3 and all(complete(commit.files) for commit in commits)
    assert any("Training in progress" in commit.message and "config.json" in commit.files for commit in commits)
    files = hub.files(f"{USER}/run")
    assert {"model.safetensors", "tokenizer.json", "metrics.json", "loss.png", "README.md"} <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and '"someone/run"' in card.text
    assert files["README.md"] == (tmp_path / "run" / "README.md").read_bytes()
