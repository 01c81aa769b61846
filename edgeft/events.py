"""Event files for TensorBoard, without TensorBoard: `tensorboard --logdir runs` shows them while a stage runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

NAME = "events.out.tfevents.edgeft"  # TensorBoard looks for "tfevents"; its usual names tell the host and process


class EventFile:
    """Scalars by step, appended to one file in `folder`; what is written is on disk."""

    def __init__(self, folder: Path) -> None:
        self._writer = RecordWriter(str(folder / NAME))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def _write(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()
