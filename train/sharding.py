"""Parameters that several processes share (FSDP2, expert parallelism): the part held here, and the whole."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of it that this process holds; itself, if it is not shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, in the CPU's memory. Every process that shares it must call."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor what belongs here, shared as `like` is; no process speaks to another."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:  # another shape is load_state_dict's to refuse
        return tensor
    tensor = tensor.to(like.device, like.dtype)
    # torch deals out no strided parts: what FSDP makes of experts that are shared already.
    plain = [Shard(place.dim) if hasattr(place, "split_factor") else place for place in like.placements]
    shared = distribute_tensor(tensor, like.device_mesh, plain, src_data_rank=None)
    return shared if tuple(plain) == tuple(like.placements) else shared.redistribute(placements=like.placements)


def gathered(state: Mapping, keep: bool) -> dict:
    """A state dict with every tensor whole, one after the other; empty where it is not to be kept."""
    kept = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            value = gathered(value, keep)
        elif isinstance(value, torch.Tensor):
            value = whole(value)
        if keep:
            kept[name] = value
    return kept


def rows_group(tensor: DTensor) -> dist.ProcessGroup:
    """The processes among which the rows of a matrix are spread.

    Raises: ValueError if it is spread in any other way.
    """
    spread = [axis for axis, place in enumerate(tensor.placements) if not isinstance(place, Replicate)]
    if len(spread) != 1 or tensor.placements[spread[0]] != Shard(0):
        raise ValueError(
            f"Muon needs whole matrices or rows spread over one group of processes, and one of {list(tensor.shape)} is "
            f"placed as {tensor.placements}; optimizer.name=adamw takes any"
        )
    return tensor.device_mesh.get_group(spread[0])


def on_whole_matrices(function, parts: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """`function` of whole matrices, each computed by one process, where every process holds some rows of all.

    Two exchanges: the rows of a matrix go to the process that is to compute it, and its result's rows come back.

    Args:
        function: [k, rows, c] -> [k, rows, c].
        parts: [n, r, c], this process's rows of n matrices: as torch.chunk deals them out, so the last may have fewer.
        rows: of a whole matrix.

    Returns: [n, r, c].
    """
    size, (count, here, columns) = group.size(), parts.shape
    each, most = -(-count // size), -(-rows // size)  # matrices that a process computes; rows that it holds at most
    send = parts.new_zeros(size * each, most, columns)
    send[:count, :here] = parts
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    # [source, each, most, c] -> [each, source * most, c]: what fills up the rows ends up behind the last.
    matrices = received.view(size, each, most, columns).transpose(0, 1).reshape(each, size * most, columns)
    results = function(matrices[:, :rows])
    send = send.zero_().view(each, size * most, columns)
    send[:, :rows] = results
    send = send.view(each, size, most, columns).transpose(0, 1).contiguous()
    dist.all_to_all_single(received, send.view_as(received), group=group)
    return received[:count, :here]
