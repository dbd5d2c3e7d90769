"""Many pictures, in shards that any number of processes on any number of machines draw without a word between them.

A picture is a function of (seed, id), so a shard is a function of its number. `plan` says which ids are in which
shard, `part` where a worker begins, `store` where files are kept, `formats` what a shard's files are, `shard_set` what
is there and whether it is whole, `claims` who is at what; `maker` draws, `worker` goes through the shards, and
`ray_cluster` hands them to Ray; `gathering` reads them again.
"""
