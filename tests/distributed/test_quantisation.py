"""Two processes (gloo) that share a model whose layers torchao quantises: exactly the model of the weights they hold.

Each process quantises its own part of a matrix. Whole rows (kv_b_proj and the like) are rounded as in one process; of
rows that are split (o_proj, down_proj) each part has a scale of its own, and so is rounded otherwise.
"""

import functools
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TorchAoConfig
from transformers.distributed import DistributedConfig

from modeling_nanodeepseek import NanoDeepSeekForCausalLM
from modeling_nanodeepseek.layers import is_quantized
from tests.conftest import rms_ratio, tiny_model, tokens
from tests.distributed import processes
from tests.distributed.test_parallel_plans import GENERATION, MODELS

FLOAT8, INT8 = "Float8WeightOnlyConfig", "Int8WeightOnlyConfig"
CASES = [(FLOAT8, "absorbed"), (FLOAT8, "sparse"), (FLOAT8, "indexer-warm-up"), (INT8, "expanded")]
# RMS of the rounding over RMS of the weights, spread evenly up to: 2^-4 of each number (e4m3 has 3 bits of mantissa),
# half of the row's largest / 127 (taken as 3 RMS of the row).
ROUNDING = {FLOAT8: 2**-4 / math.sqrt(3), INT8: 3 / 127 / 2 / math.sqrt(3)}


def whole_weight(parameter: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What all ranks' parts of a parameter are together, dequantised."""
    if isinstance(parameter, DTensor):
        return processes.whole(parameter).detach()
    part = (parameter.dequantize() if is_quantized(parameter) else parameter).detach().contiguous()
    split = [dim for dim in range(part.ndim) if part.shape[dim] != shape[dim]]
    if not split:
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts, split[0])


def gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Of one training step, of everything that is to learn."""
    model.train()(ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: None if grad is None else processes.whole(grad) for name, grad in grads.items()}


def work(rank: int, world: int, folder: str) -> list[dict]:
    import torchao.quantization

    results, ids = [], tokens(2, 13)
    for kind, name in CASES:
        plain = tiny_model(num_attention_heads=4, vocab_size=98, **MODELS[name])
        path = f"{folder}/{kind}-{name}"
        if rank == 0:
            plain.save_pretrained(path)
        dist.barrier()
        load = functools.partial(
            NanoDeepSeekForCausalLM.from_pretrained,
            path,
            quantization_config=TorchAoConfig(getattr(torchao.quantization, kind)()),
        )
        alone, shared = load().eval(), load(distributed_config=DistributedConfig(tp_size=world)).eval()
        # The weights that the ranks hold, as plain numbers, in one process.
        weights, held, joined = {}, dict(shared.named_parameters()), plain
        for key, parameter in joined.named_parameters():
            parameter.data = whole_weight(held[key], parameter.shape)
            parameter.requires_grad_(held[key].requires_grad)
            weights[key] = rms_ratio(whole_weight(alone.get_parameter(key), parameter.shape), parameter)
        with torch.no_grad():
            logits, expected, of_alone = (model(ids).logits for model in (shared, joined, alone))
        text, expected_text = (model.generate(ids, **GENERATION) for model in (shared, joined))
        grads, expected_grads = gradients(shared, ids), gradients(joined, ids)
        results.append(
            {
                "quantised": {key for key, parameter in held.items() if is_quantized(parameter)},
                "weights": {key: error for key, error in weights.items() if error},
                "logits": rms_ratio(expected, logits),
                "logits of one process": rms_ratio(of_alone, logits),
                "text": torch.equal(expected_text, text),
                "gradients": {key: rms_ratio(grad, grads[key]) for key, grad in expected_grads.items()},
            }
        )
    return results


def test_is_the_model_of_its_weights(tmp_path):
    pytest.importorskip("torchao.quantization", reason="pip install torchao")
    for rank in processes.run(functools.partial(work, folder=str(tmp_path)), tmp_path, seconds=300):
        for (kind, name), found in zip(CASES, rank, strict=True):
            assert found["logits"] < 1e-5 and found["text"], (kind, name, found)
            assert found["gradients"] and max(found["gradients"].values()) < 1e-4, (kind, name, found["gradients"])
            # What differs from one process: the parts of split rows, by a rounding, and the logits by the sum of these.
            split = {key for key in found["quantised"] if key.endswith(("o_proj.weight", "down_proj.weight"))}
            assert found["weights"].keys() == split and len(split) == 6, (kind, name, found["weights"])
            assert max(found["weights"].values()) < ROUNDING[kind], (kind, name, found["weights"])
            if name in ("expanded", "absorbed"):  # a selection of keys may change by more
                assert found["logits of one process"] < len(split) * ROUNDING[kind], (kind, name, found)
