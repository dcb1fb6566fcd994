"""An engine in a process of its own, and what lies between it and the processes that speak HTTP.

    HTTP process: requests, aborts --ZeroMQ--> engine core
         ^  RemoteEngine                          | CoreServer
         '------- outputs of each step -----------'

`child` starts and watches processes, `messages` is all that is said, `client` and `link` are the HTTP process's
end, `serving` is the core's, `connections` what the core knows of each HTTP process. Needs pyzmq and msgspec, which
are imported where they are first used.
"""
