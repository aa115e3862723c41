"""Defaults, validation, and the combinations of toggles that a config accepts."""

import itertools
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_nanodeepseek import NanoDeepSeekConfig
from tests.conftest import SPARSE, tiny_config
from train.models import build_config, build_model, model_files, variants

REFUSED = [
    ({"attention_type": "mqa"}, ["attention_type='mqa'", "'mla', 'gqa'"]),
    ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu', 'relu2'"]),
    ({"scoring_func": "tanh"}, ["scoring_func='tanh'", "'sigmoid', 'softmax'"]),
    ({"topk_method": "best"}, ["topk_method='best'", "'noaux_tc'"]),
    ({"attention_form": "dense"}, ["attention_form='dense'", "'absorbed'"]),
    ({"hidden_size": 36}, ["hidden_size=36", "multiple of 8"]),
    ({"moe_intermediate_size": 20}, ["moe_intermediate_size=20", "multiple of 8"]),
    ({"num_experts_per_tok": 1}, ["num_experts_per_tok=1", "router cannot learn"]),
    ({"num_experts_per_tok": 5}, ["num_experts_per_tok=5", "1..4"]),
    ({"n_group": 3}, ["n_group=3", "divide n_routed_experts=8"]),
    ({"n_group": 8, "topk_group": 4}, ["n_group=8", "at least 2 each"]),
    ({"topk_group": 5}, ["topk_group=5", "1..n_group=4"]),
    ({"n_routed_experts": 1}, ["n_routed_experts=1", "at least 2"]),
    ({"qk_norm": True}, ["qk_norm=True", "attention_type='gqa'"]),
    ({"num_key_value_heads": 1}, ["num_key_value_heads=1", "one per head"]),
    (
        {"attention_type": "gqa", "num_key_value_heads": 2, "head_dim": 8},
        ["num_key_value_heads=2", "num_attention_heads=3"],
    ),
    ({"qk_rope_head_dim": 5}, ["qk_rope_head_dim=5", "even"]),
    ({"vocab_size": 0}, ["vocab_size=0", "at least 1"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers=0", "at least 1"]),
    ({"eos_token_id": 97}, ["eos_token_id=97", "0..96"]),
    ({"pad_token_id": -1}, ["pad_token_id=-1", "0..96"]),
    ({"adaptive_expert_threshold": 1.0}, ["adaptive_expert_threshold=1.0", "[0, 1)"]),
    ({"router_noise": -0.1}, ["router_noise=-0.1", "at least 0"]),
    ({"seq_aux": False}, ["seq_aux=False", "sequence-wise"]),
    ({"rope_parameters": {"rope_type": "default", "type": "yarn"}}, ["type='yarn'", "rope_type='default'"]),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, ["rope_type='longrope'", "'yarn'"]),
    ({"rope_parameters": {"rope_type": "dynamic"}}, ["rope_parameters lacks 'factor'"]),
    (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "qk_rope_head_dim": 2},
        ["qk_rope_head_dim=2", "at least 4"],
    ),
    ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters lacks 'factor'"]),
    ({"rope_parameters": {"rope_type": "linear", "factor": -3.0}}, ["['factor']=-3.0", "at least 1"]),
    ({"rope_parameters": {"rope_type": "default", "facter": 2.0}}, ["no field 'facter'", "'rope_theta'"]),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, ["['rope_theta']=0", "above 0"]),
    ({"rope_parameters": None, "rope_theta": "x"}, ["['rope_theta']='x'", "a number"]),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["no field 'partial_rotary_factor'"]),
    ({"routed_scaling_factor": float("nan")}, ["routed_scaling_factor=nan", "finite"]),
    ({"n_shared_experts": -1}, ["n_shared_experts=-1", "at least 0"]),
    ({"n_group": 0}, ["n_group=0", "at least 1"]),
    ({"topk_group": 0}, ["topk_group=0", "1..n_group=4"]),
    ({"attention_type": "gqa", "head_dim": 7}, ["head_dim=7", "even"]),
    ({"validate_sizes": 3}, ["no field 'validate_sizes'"]),
    ({"model_type": "deepseek_v2"}, ["'deepseek_v2'", "from_pretrained"]),
    ({"hidden_size": "big"}, ["hidden_size", "expected int", "big"]),
    (SPARSE | {"index_topk": 0}, ["index_topk=0", "at least 1, or None"]),
    (SPARSE | {"index_topk": -1}, ["index_topk=-1", "at least 1, or None"]),
    (SPARSE | {"index_topk": 2.5}, ["index_topk", "2.5"]),
    (SPARSE | {"q_lora_rank": None}, ["q_lora_rank=None", "reads the query latent", "index_topk=None"]),
    (SPARSE | {"index_window": 6}, ["index_window=6", "is 6, and index_topk only 5"]),
    (SPARSE | {"index_window": 3, "index_global_tokens": 3}, ["index_window=3", "is 6, and index_topk only 5"]),
    (SPARSE | {"index_window": -1}, ["index_window=-1", "at least 0"]),
    (SPARSE | {"index_global_tokens": -2}, ["index_global_tokens=-2", "at least 0"]),
    (SPARSE | {"index_global_tokens": 6}, ["index_global_tokens=6", "is 6, and index_topk only 5"]),
    (SPARSE | {"index_loss_coef": -0.5}, ["index_loss_coef=-0.5", "at least 0"]),
    ({"index_pattern": "random"}, ["index_pattern='random'", "'learned', 'fixed'"]),
    ({"dsa_stage": "sparse_training"}, ["dsa_stage='sparse_training'", "'dense', 'warmup', 'sparse'"]),
    ({"sparse_form": "flash"}, ["sparse_form='flash'", "'gathered'"]),
    (SPARSE | {"attention_type": "gqa", "head_dim": 8}, ["index_topk=5", "attention_type='mla'"]),
    (SPARSE | {"index_pattern": "fixed", "index_window": 4}, ["index_topk=5", "= 4 keys", "must be 4"]),
    (
        {"index_topk": 4, "index_window": 4, "index_pattern": "fixed", "dsa_stage": "warmup"},
        ["dsa_stage='warmup'", "no indexer"],
    ),
    (SPARSE | {"index_n_heads": 0}, ["index_n_heads=0", "at least 1"]),
    (SPARSE | {"index_head_dim": 4}, ["index_head_dim=4", "qk_rope_head_dim=6"]),
    (SPARSE | {"index_hadamard": True}, ["index_head_dim=10", "index_hadamard=True", "power of two"]),
]


@pytest.mark.parametrize("fields, words", REFUSED, ids=[next(iter(f)) + str(i) for i, (f, _) in enumerate(REFUSED)])
def test_impossible_values_are_named(fields, words):
    with pytest.raises((StrictDataclassError, ValueError)) as error:
        tiny_config(**fields)
    for word in words:
        assert word in str(error.value)


def test_unknown_field_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="no field 'n_routed_expert' .*did you mean 'n_routed_experts'"):
        tiny_config(n_routed_expert=8)


def test_unknown_field_in_a_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nanodeepseek", "kv_lora_ranks": 3}))
    with pytest.raises(ValueError, match="kv_lora_rank'"):
        AutoConfig.from_pretrained(tmp_path)


def test_notes_of_others_in_a_file_are_kept_and_named(tmp_path, caplog):
    """A config on which somebody set an attribute of their own can be saved and read, as any config of transformers."""
    config = tiny_config()
    config.unsloth_version = "2026.1"
    config.layer_norm_eps = 1.0
    config.save_pretrained(tmp_path)
    for read in (AutoConfig.from_pretrained(tmp_path), NanoDeepSeekConfig.from_pretrained(tmp_path)):
        assert (read.unsloth_version, read.layer_norm_eps, read.rms_norm_eps) == ("2026.1", 1.0, 1e-6)
        assert read.to_dict()["unsloth_version"] == "2026.1"
    read, unused = NanoDeepSeekConfig.from_pretrained(tmp_path, return_unused_kwargs=True, colour="red", n_group=2)
    assert (read.unsloth_version, read.n_group, unused) == ("2026.1", 2, {"colour": "red"})
    assert "keeps but does not use: 'layer_norm_eps', 'unsloth_version'." in caplog.text


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32"])
def test_unknown_fields_of_another_family_are_refused(family, tmp_path):
    """There they are a part of the model that this one does not have."""
    values = {"model_type": family, "indexer_rope_interleave": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="no field 'indexer_rope_interleave'"):
        NanoDeepSeekConfig.from_dict(values)
    with pytest.raises(ValueError, match="no field 'indexer_rope_interleave'"):
        NanoDeepSeekConfig.from_pretrained(tmp_path)


def test_an_unknown_toggle_is_refused():
    with pytest.raises(ValueError, match="no field 'n_layers' .given 3."):
        build_config("quickstart", n_layers=3)


def test_defaults_are_deepseek_v3():
    config = NanoDeepSeekConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.n_routed_experts) == (7168, 61, 256)
    assert (config.num_experts_per_tok, config.n_group, config.topk_group) == (8, 8, 4)
    assert (config.q_lora_rank, config.kv_lora_rank, config.qk_head_dim, config.head_dim) == (1536, 512, 192, 64)
    assert (config.scoring_func, config.topk_method, config.routed_scaling_factor) == ("sigmoid", "noaux_tc", 2.5)
    assert config.num_key_value_heads == 128 and config.aux_loss_alpha == 1e-4
    assert config.num_experts == config.num_local_experts == 256


@pytest.mark.parametrize("attention_type", ["mla", "gqa"])
def test_round_trip_through_a_file(attention_type, tmp_path):
    heads = {} if attention_type == "mla" else {"num_key_value_heads": 1, "head_dim": 8}
    config = tiny_config(attention_type=attention_type, **heads)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is NanoDeepSeekConfig
    ignored = {"transformers_version": None, "_name_or_path": None}
    assert read.to_dict() | ignored == config.to_dict() | ignored
    assert read.head_dim == (6 if attention_type == "mla" else 8)


def test_a_variant_of_a_saved_config_has_its_own_head_size(tmp_path):
    build_config("quickstart").save_pretrained(tmp_path)
    saved = str(tmp_path / "config.json")
    assert (
        build_config(saved, "dense_transformer").head_dim
        == build_config("quickstart", "dense_transformer").head_dim
        == 64
    )
    assert build_config(saved, attention_type="gqa", head_dim=8).head_dim == 8
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="broken.json' is not valid JSON"):
        build_config(str(tmp_path / "broken.json"))
    with pytest.raises(ValueError, match="list.json' must hold a JSON object"):
        build_config(str(tmp_path / "list.json"))


def test_which_layers_hold_experts():
    config = tiny_config(num_hidden_layers=6, first_k_dense_replace=2, moe_layer_freq=2)
    assert [config.is_moe_layer(i) for i in range(6)] == [False, False, True, False, True, False]
    assert not any(tiny_config(n_routed_experts=None).is_moe_layer(i) for i in range(3))


def test_every_size_and_variant_builds():
    assert {"small", "base", "large", "quickstart"} <= set(model_files())
    expected = {"small": (6, 384, 4, 4), "base": (12, 768, 6, 8), "large": (24, 1536, 12, 8)}
    for name, (layers, width, heads, experts) in expected.items():
        config = build_config(name)
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
        assert (config.n_routed_experts, config.num_experts_per_tok) == (experts, 2)
    for name, variant in itertools.product(model_files(), variants()):
        build_config(name, variant)
    with pytest.raises(ValueError, match="'huge' is neither"):
        build_config("huge")
    with pytest.raises(ValueError, match="'sparse' is not one of dense_transformer"):
        build_config("small", "sparse")


def test_the_plain_transformer_is_one_call_away():
    model = build_model("small", "dense_transformer", num_hidden_layers=2)
    names = {name for name, _ in model.named_parameters()}
    assert not any("norm" in name or "experts" in name or "gate" in name or "kv_a" in name for name in names)
    assert model.model.layers[0].self_attn.num_key_value_groups == 2
    assert type(model.model.layers[0].mlp.act_fn).__name__ == "ReLUSquaredActivation"
    assert type(model.model.layers[0].self_attn.q_norm).__name__ == "RMSNorm"


def test_model_names_of_the_registry():
    for name in model_files():
        assert json.loads(model_files()[name].read_text())["model_type"] == NanoDeepSeekConfig.model_type
