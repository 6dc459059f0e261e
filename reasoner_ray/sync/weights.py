"""vLLM's native weight transfer, for vLLM 0.32: the one file that imports it.

The engine side is the same for every backend: ``init_weight_transfer_engine``, then for each sync
``start_weight_update``, ``update_weights`` (once or more), ``finish_weight_update``. ``object_store`` is registered
here and runs anywhere; ``nccl`` and ``ipc`` are vLLM's own and need CUDA.
"""

from __future__ import annotations

import base64
import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightTransferInitInfo, WeightTransferUpdateInfo

from reasoner_ray import settings as process
from reasoner_ray.errors import ConfigError
from reasoner_ray.sync.backends import PushSettings
from reasoner_ray.sync.buckets import Bucket, unpack_bucket

BACKEND = "object_store"


@dataclass
class ObjectStoreInit(WeightTransferInitInfo):
    """Nothing to agree on: whoever calls ``update_weights`` brings the bytes."""


@dataclass
class ObjectStoreUpdate(WeightTransferUpdateInfo):
    """One bucket; the fields of ``Bucket``, as plain types that cross process borders."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    data: list[np.ndarray] | list[bytes]

    @classmethod
    def pack(cls, bucket: Bucket, *, as_bytes: bool) -> dict[str, Any]:
        """``bucket`` as the dict ``update_weights`` takes; ``as_bytes`` where the engine lives in another process."""
        data = [array.tobytes() for array in bucket.data] if as_bytes else bucket.data
        return {"names": bucket.names, "dtypes": bucket.dtypes, "shapes": bucket.shapes, "data": data}


class ObjectStoreEngine(WeightTransferEngine[ObjectStoreInit, ObjectStoreUpdate]):
    """Loads buckets in checkpoint format through vLLM's layer-wise reload."""

    init_info_cls = ObjectStoreInit
    update_info_cls = ObjectStoreUpdate

    def init_transfer_engine(self, init_info: ObjectStoreInit) -> None:
        """No rendezvous."""

    def start_weight_update(self) -> None:
        """Prepare every layer to be loaded anew."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ObjectStoreUpdate) -> None:
        """Load one bucket."""
        bucket = Bucket(
            update_info.names, update_info.dtypes, update_info.shapes, [np.frombuffer(d, dtype=np.uint8) for d in update_info.data]
        )
        self.model.load_weights(unpack_bucket(bucket))

    def finish_weight_update(self) -> None:
        """Finish the reload and repack what it left stale."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_embeddings(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""


def repack_embeddings(model: torch.nn.Module) -> None:
    """Rebuild the packed matrices of LM heads whose weight is another layer's.

    On CPUs vLLM multiplies by a packed copy of the weight, made when the layer was loaded. A tied LM head is not
    loaded (its weight is the embedding's), so after a reload its copy holds the old weights, with no error: log-probs
    are then off by as much as the embedding moved.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


class WorkerExtension:
    """Named in ``worker_extension_cls``, so that vLLM's workers import this module: they know the backend, and end with their owner."""


def _end_with(owner: int, parent: int) -> None:
    """Wait until ``owner``, whose engine this worker is part of, has ended in whatever way; then end vLLM's processes.

    vLLM's engine core (``parent``, or this process itself) notices no such end: it would keep its GPU for nobody, and the engine that
    replaces it would find no room.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(owner).wait()
    if parent != owner:
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if (_owner := process.engine_owner()) is not None and (_parent := multiprocessing.parent_process()) is not None:
    threading.Thread(target=_end_with, args=(_owner, _parent.pid), name="end-with-owner", daemon=True).start()

WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreEngine)


# -- nccl and ipc: vLLM's trainer side, run by every learner rank ---------------------------------------------------------


class EngineClients:
    """vLLM's ``VLLMWeightSyncClient`` for several independent engines: each gets NCCL ranks of its own, after the trainer's 0."""

    def __init__(self, actors: Sequence[Any], gpus_per_engine: int, timeout_s: float) -> None:
        self.actors = list(actors)
        self.gpus_per_engine = gpus_per_engine
        self.timeout_s = timeout_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Tell each engine how to meet the trainer; its connection to an earlier group, if any, is dropped first."""
        self._call("shutdown_weight_transfer_engine")
        infos = [
            {**init_info, "rank_offset": init_info["rank_offset"] + i * self.gpus_per_engine} if "rank_offset" in init_info else init_info
            for i in range(len(self.actors))
        ]
        self._call("init_weight_transfer_engine", [{"init_info": info} for info in infos])

    def start_weight_update(self) -> None:
        """Prepare every engine to be loaded anew."""
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Let every engine receive."""
        if isinstance(update_info, dict) and update_info.get("ipc_handles") is not None:
            handles = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
            update_info = {**update_info, "ipc_handles": None, "ipc_handles_pickled": handles}
        self._call("update_weights", [{"update_info": update_info}] * len(self.actors))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update; the pool labels the version."""
        self._call("finish_weight_update")

    def _call(self, method: str, infos: Sequence[dict[str, Any] | None] | None = None) -> None:
        import ray

        infos = infos or [None] * len(self.actors)
        ray.get([actor.transfer.remote(method, info) for actor, info in zip(self.actors, infos, strict=True)], timeout=self.timeout_s)


class LearnerSource(WeightSource):
    """A learner's weights as vLLM's trainer side reads them; iterating is a collective of all ranks."""

    def __init__(self, state: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> None:
        self._state = state
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and whole shapes; found out once, by a pass over the weights."""
        if self._metadata is None:
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._state()]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._state():
            yield name, tensor.clone()  # vLLM gathers a whole buffer of them; the learner's own is gone when the next one comes


@dataclass
class _Sender:
    """The connection of this process to the engines it last sent to."""

    key: tuple[Any, ...]
    trainer: TrainerWeightTransferEngine[Any]


_SENDERS: dict[str, _Sender] = {}
"""By backend. A process is one learner rank, so there is one connection of a kind."""


def send_native(learner: Any, settings: PushSettings, actors: Sequence[Any], address: str, port: int) -> None:
    """Send a learner rank's weights to ``actors`` by ``nccl`` or ``ipc``; every rank calls it at once.

    Connects anew where the engines are others than last time. ``address`` and ``port`` are rank 0's, free for NCCL to meet.
    ``ipc`` has run on a GPU; ``nccl``, which needs two, has not: tests replace the collective. Raises Ray's errors where an engine does
    not answer.
    """
    key = tuple(actor._actor_id.hex() for actor in actors)
    known = _SENDERS.pop(settings.backend, None)  # one that fails is not used again
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # vLLM reads the weights on streams of its own
    if known is None or known.key != key:
        if known is not None:
            known.trainer.shutdown()
        source = LearnerSource(learner.state_for_sync)
        info = trainer_info(settings, learner.engine.rank, address, port, engines=len(key), metadata=source.metadata())
        clients = EngineClients(actors, settings.gpus_per_engine, settings.timeout_s)
        known = _Sender(key, WeightTransferTrainerFactory.trainer_init(info, client=clients, source=source))
    known.trainer.send_weights()
    _SENDERS[settings.backend] = known


def trainer_info(
    settings: PushSettings, rank: int, address: str, port: int, *, engines: int, metadata: Sequence[ParamMeta]
) -> TrainerInitInfo:
    """What vLLM's trainer side needs to know. Raises ``ConfigError`` for a backend that has none."""
    if settings.backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        world_size = 1 + engines * settings.gpus_per_engine
        return NCCLTrainerInitInfo(address, port, world_size, packed_buffer_size_bytes=settings.buffer_bytes, rank=rank)
    if settings.backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        largest = max(math.prod(m.shape) * m.dtype.itemsize for m in metadata)  # must fit into the buffer
        return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=max(settings.buffer_bytes, largest), rank=rank)
    raise ConfigError(f"sync.backend: {settings.backend} has no trainer side; take object_store, nccl or ipc")
