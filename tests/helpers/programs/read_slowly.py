"""DATA IMAGES_SEEN [workers]: read batches slowly for ever, and print the process's id, then the position and the ids of each.

`workers`: print their process ids after the first batch, and end.
"""

import os
import sys
import time

from tarflow.data_pipeline.loading.loader import Loader
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape


def main(data: str, seen: int, show_workers: bool) -> None:
    loader = Loader(DataSettings.of(data, num_workers=2), ImageShape(8), BatchShard(4), images_seen=seen)
    for batch in loader:
        if batch.images_seen == seen:
            print(os.getpid(), flush=True)
        print(batch.images_seen, *batch.ids.tolist(), flush=True)
        if show_workers:
            print(*loader.worker_pids())
            break
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["workers"])
