"""rpo.training.meter: means against plain numpy, FLOPs by hand, wandb's mode and file, and names as docs/METRICS.md has them."""

import json
import struct

from wandb.proto.wandb_internal_pb2 import Record


def read_wandb(path):
    """The records of a .wandb file: LevelDB's log framing, 7-byte headers within 32 KiB blocks, after a 7-byte magic."""
    content, at, payload = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at < len(content):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header: zeros to the block's end
            at += left
            continue
        _crc, length, kind = struct.unpack("<IHB", content[at : at + 7])
        payload += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or a record's last part
            record = Record()
            record.ParseFromString(payload)
            yield record
            payload = b""
    assert payload == b"", "the file ends within a record"


def key_of(item):
    return item.key or "/".join(item.nested_key)


def history_of(path):
    """What was logged into a .wandb file, row by row."""
    rows = [record.history for record in read_wandb(path) if record.HasField("history")]
    return [{key_of(item): json.loads(item.value_json) for item in row.item} for row in rows]
