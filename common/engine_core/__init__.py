"""An engine in a process of its own, and the links between it and the HTTP processes.

    HTTP process: requests, aborts --ZeroMQ--> engine core
         ^  RemoteEngine                          | CoreServer
         '------- outputs of each step -----------'

`child` starts and watches processes. `messages` defines every message. `client` and `link` are the HTTP
process's end, `serving` is the core's, and `connections` is what the core knows of each HTTP process.
pyzmq and msgspec are needed, and imported where they are first used.
"""
