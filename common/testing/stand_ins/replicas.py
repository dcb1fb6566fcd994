"""A stand-in that a launcher starts, as it starts a part's replicas: told by a job, ended with its input."""

import asyncio
import json
import sys
import threading
import time

from common.router.child import end_with_input
from common.testing.stand_ins.server import StandIn, serve


def main() -> None:
    begin = time.monotonic()
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_input, args=(job["grace"],), daemon=True).start()
    model, server = job["engine"]["model"], job["server"]
    if model == "does-not-exist":
        sys.exit("error: model does-not-exist: there is none of that name")
    stand_in = StandIn(model, tokens=40, interval=0.02, first=0.1, api_key=server["api_key"])
    asyncio.run(serve(stand_in, server["host"], server["port"], begin))


if __name__ == "__main__":
    main()
