"""Checkpoints in pieces: a folder that every rank writes its part of (torch.distributed.checkpoint), while training
goes on, and that a world of any size reads.

NAME.dcp/ holds tensors by flat names (`model.<released name>`, `optim.<released name>.<slot>`) in `__<rank>_*.distcp`,
where they lie in `.metadata`, what is no tensor in `plain.json`, and the SHA-256 of each file in `SHA256SUMS` (for
`sha256sum -c`). It appears under its name when all of it is on the disk.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from maskfeat.checkpoint.atomic import fsync_dir, sha256, write_and_fsync
from maskfeat.checkpoint.sharded_files import METADATA, PLAIN, SUMS, Places, Reader, sums_of, tensors_of, verify
from maskfeat.checkpoint.weights import ReleasedModule
from maskfeat.distributed.collectives import broadcast_buffers

SUFFIX = ".dcp"
MODEL, OPTIMIZER = "model.", "optim."

Group = dist.ProcessGroup | None
Result = TypeVar("Result")

# No rank waits for another while it reads, and one process has no process group: PyTorch warns of either each time.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def training_tensors(objective: ReleasedModule, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """What a checkpoint holds, by flat names: the tensors themselves, whole or in pieces, not copies.

    Collective: buffers, of which every rank has its own, become those of rank 0.
    """
    broadcast_buffers(objective)
    tensors = {MODEL + name: value for name, value in objective.released_state().items()}
    if optimizer is not None:
        for name, parameter in objective.named_parameters():
            for slot, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{OPTIMIZER}{objective.released_name(name)}.{slot}"] = value
    return tensors


def load_training(folder: str | Path, objective: ReleasedModule, optimizer: Optimizer, group: Group = None) -> None:
    """Load weights and optimizer state, in place; collective. `group` as in `load_sharded`.

    Raises:
        ValueError: as `load_sharded`, on every rank.
    """
    names = {id(parameter): objective.released_name(name) for name, parameter in objective.named_parameters()}

    def begin_slots() -> None:
        """An optimizer makes them with its first step."""
        found: dict[str, dict[str, TensorStorageMetadata]] = {}
        for name, value in tensors_of(Path(folder)).items():
            owner, _, slot = name.removeprefix(OPTIMIZER).rpartition(".")
            if name.startswith(OPTIMIZER):
                found.setdefault(owner, {})[slot] = value
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for slot, value in found.get(names[id(parameter)], {}).items():
                    if slot in optimizer.state[parameter]:
                        continue
                    if value.size == parameter.shape:
                        empty = torch.zeros_like(parameter, requires_grad=False)
                    else:  # steps, which fused kernels count on the device
                        device = parameter.device if group["fused"] else torch.device("cpu")
                        empty = torch.zeros(value.size, dtype=value.properties.dtype, device=device)
                    optimizer.state[parameter][slot] = empty

    _together(begin_slots, group)
    load_sharded(folder, training_tensors(objective, optimizer), group)


class SaveHandle:
    """A checkpoint that is being written.

    Attributes:
        folder: where it will lie.
    """

    def __init__(self, folder: Path, work: "Future[None]") -> None:
        self.folder, self._work, self._waited_for = folder, work, False

    def done(self) -> bool:
        """Whether the writing has ended, well or not."""
        return self._work.done()

    def wait(self) -> None:
        """Wait until the folder lies under its name.

        Raises:
            OSError: where it could not be written, on every rank; the message names the folder, and what was there
                under its name before is there still.
        """
        self._waited_for = True
        self._work.result()

    def end(self) -> None:
        """Wait as well, for whoever wants to begin another; the error only where nobody has heard of it yet.

        Raises:
            OSError: as `wait`.
        """
        if self._waited_for:
            self._work.exception()
        else:
            self.wait()


_under_way: SaveHandle | None = None


def save_sharded(
    folder: str | Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], group: Group = None
) -> SaveHandle:
    """Begin to write a checkpoint; collective. Tensors are copied to the CPU before this returns, and may change then.

    One is written at a time: a call waits for the one before, whose error, if nobody has waited for it, comes up here.

    Args:
        folder: ends in `.dcp`; one of this name is replaced.
        tensors: by flat names, see `training_tensors`.
        plain: what is no tensor, of types that JSON knows; the same on every rank.
        group: a process group on the CPU (gloo) of all ranks that nothing else uses while a checkpoint is written, for
            the writing thread waits for the other ranks' in it; None = the default group, which must be gloo then and
            used for nothing else meanwhile; without a process group, this process writes alone.
    """
    global _under_way
    if _under_way is not None:
        before, _under_way = _under_way, None
        before.end()
    folder = Path(folder)
    text = json.dumps(dict(plain), indent=1, allow_nan=False)
    partial = folder.with_name(f".{folder.name}.partial")
    rank = dist.get_rank(group) if dist.is_initialized() else 0

    def make_room() -> None:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    try:
        _together(make_room, group, OSError)
        writing = dcp.async_save(dict(tensors), storage_writer=_Writer(partial), process_group=group)
    except OSError as error:
        raise OSError(f"could not write the checkpoint {folder}: {error}") from error
    assert isinstance(writing, Future)  # no stager was given that would work on its own
    worker = ThreadPoolExecutor(1, "sharded_checkpoint")
    _under_way = SaveHandle(folder, worker.submit(_finish, writing, partial, folder, text, rank, group))
    worker.shutdown(wait=False)
    return _under_way


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> None:
        """None: it would name the folder in which the checkpoint was written."""


def _finish(writing: "Future[Any]", partial: Path, folder: Path, plain: str, rank: int, group: Group) -> None:
    """In a thread: wait for PyTorch, add what it does not write, and give the folder its name."""

    def sums_of_mine() -> dict[str, str]:
        names = [path.name for path in partial.glob(f"__{rank}_*")]
        if rank == 0:
            write_and_fsync(partial / PLAIN, plain.encode())
            names += [METADATA, PLAIN]
        return {name: sha256(partial / name) for name in names}

    def publish() -> None:
        if rank:
            return
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        write_and_fsync(partial / SUMS, lines.encode())
        fsync_dir(partial)
        old = folder.with_name(f".{folder.name}.old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(partial, folder)
        fsync_dir(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    try:
        writing.result()
        sums = {name: digest for mine in _together(sums_of_mine, group, OSError) for name, digest in mine.items()}
        _together(publish, group, OSError)
    except dcp.CheckpointException as error:  # of every rank on every rank; it is no Exception
        why = "; ".join(f"rank {number}: {failure}" for number, (failure, _) in error.failures.items())
        raise _failed(folder, partial, rank, why) from error
    except (OSError, RuntimeError) as error:  # the latter where another rank is gone
        raise _failed(folder, partial, rank, error) from error


def _failed(folder: Path, partial: Path, rank: int, why: object) -> OSError:
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    return OSError(f"could not write the checkpoint {folder}: {why}")


def read_sharded_plain(folder: str | Path) -> dict[str, Any]:
    """What is no tensor, as it was given to `save_sharded`.

    Raises:
        ValueError: where it is missing or damaged.
    """
    folder = Path(folder)
    verify(folder, [PLAIN])
    content = json.loads((folder / PLAIN).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{folder / PLAIN} holds a {type(content).__name__}, expected an object")
    return content


def load_sharded(folder: str | Path, tensors: Mapping[str, Tensor], group: Group = None) -> None:
    """Fill tensors, whole or in pieces, from a checkpoint of a world of any size; collective. Nothing is filled before
    every file was found good; ranks share that work.

    Args:
        tensors: exactly those of the checkpoint, by flat names.
        group: of all ranks; None = the default group.

    Raises:
        ValueError: on every rank alike, where a file is missing or damaged, holds more than tensors, or where names,
            shapes or dtypes are others.
    """
    folder = Path(folder)
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    _together(lambda: verify(folder, sorted(sums_of(folder))[rank::size]), group)
    _together(lambda: _check_names(folder, tensors_of(folder), tensors), group)
    _together(lambda: _load(folder, tensors), group)


def full_tensors(folder: str | Path, prefix: str = MODEL) -> dict[str, Tensor]:
    """Whole tensors on the CPU by their names after `prefix`; no other rank takes part.

    Raises:
        ValueError: as `load_sharded`.
    """
    folder = Path(folder)
    verify(folder)
    found = tensors_of(folder)
    tensors = {
        name: torch.zeros(value.size, dtype=value.properties.dtype)
        for name, value in found.items()
        if name.startswith(prefix)
    }
    _load(folder, tensors)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _check_names(folder: Path, found: Places, tensors: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is not in the checkpoint" for name in tensors if name not in found]
    problems += [f"{name} is in the checkpoint but not in this run" for name in found if name not in tensors]
    for name, tensor in tensors.items():
        if name in found:
            theirs = tuple(found[name].size), found[name].properties.dtype
            if theirs != (tuple(tensor.shape), tensor.dtype):
                problems.append(f"{name} is {theirs}, expected {tuple(tensor.shape), tensor.dtype}")
    if problems:
        shown = "\n  ".join(problems[:12]) + (f"\n  and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise ValueError(f"{folder} is of another model or optimizer than this run:\n  {shown}")


def _load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Each rank reads its pieces, and waits for nobody."""
    try:
        dcp.load(dict(tensors), storage_reader=Reader(folder), no_dist=True)
    except dcp.CheckpointException as error:
        raise ValueError(
            f"{folder} cannot be read: {[str(failure) for failure, _ in error.failures.values()]}"
        ) from error


def _together(job: Callable[[], Result], group: Group, kind: type[Exception] = ValueError) -> Sequence[Result]:
    """What `job` returned on each rank; an error of `kind` on any of them is raised on all."""
    error = result = None
    try:
        result = job()
    except kind as caught:
        error = caught
    if not dist.is_initialized():
        if error is not None:
            raise error
        return [result]  # type: ignore[list-item]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, (result, None if error is None else str(error)), group)
    for number, (_, text) in enumerate(every):
        if text is not None:
            problem = f"rank {number}: {text}"
            raise kind(problem) from error
    return [result for result, _ in every]
