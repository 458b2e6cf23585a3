"""The chaos suite: real processes, real requests, a seeded plan of faults, and an independent
judge. `make chaos`.

    run         one run from start to verdict             stack      the processes: start, kill,
    stop, begin anew plan        which faults when; pure                   faults     carries them
    out load        what clients do                           client     their requests, each noted
    in the history receiver    where webhooks arrive                     proxy      connections that
    can be paused and cut records     the history and the database's rows       audit      every
    move of every job, noted by a trigger of ours checker     what must hold; pure
    report     the tables bugs        planted, so that the checker can be seen to complain; `launch`
    puts them into a process leaks       thousands of jobs, then: is everything back where it was?

docs/chaos.md says how to read it. Nothing here is imported by the product.
"""
