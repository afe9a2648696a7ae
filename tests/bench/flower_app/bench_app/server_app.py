"""A server that does what a round needs: send the arrays to everybody, and take the mean of what returns."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

ARRAYS = 20

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write down how long each took."""
    config = context.run_config
    members, length = int(config["members"]), int(config["parameters"]) // ARRAYS
    while len(nodes := list(grid.get_node_ids())) < members:
        time.sleep(0.2)
    rng = np.random.default_rng()
    arrays = [rng.standard_normal(length, dtype=np.float32) for _ in range(ARRAYS)]
    seconds = []
    for _ in range(int(config["rounds"])):
        begun = time.monotonic()
        record = ArrayRecord(arrays)
        messages = [Message(RecordDict({"arrays": record}), dst_node_id=node, message_type="train") for node in nodes]
        replies = [reply.content["arrays"].to_numpy_ndarrays() for reply in grid.send_and_receive(messages)]
        if len(replies) != members:
            raise RuntimeError(f"expected {members} replies, got {len(replies)}")
        arrays = [np.mean(parts, axis=0, dtype=np.float32) for parts in zip(*replies, strict=True)]
        seconds.append(time.monotonic() - begun)
        Path(str(config["out"])).write_text(json.dumps(seconds))
