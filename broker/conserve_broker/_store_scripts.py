"""What runs inside Valkey or Redis, each script one atomic step, so that no check is ever apart from its deed.

The lock's value is ``<fence> <nonce> <url>``. The fence counts leaderships upwards; the nonce makes the value unlike
any other even where the store lost its data and counts from the start again, so "the lock is still mine" is one
comparison of the whole value.
"""

from __future__ import annotations

CLAIM = """
local held = redis.call('GET', KEYS[1])
if held then
  return {0, held, redis.call('PTTL', KEYS[1])}
end
local fence = redis.call('INCR', KEYS[2])
if fence <= tonumber(ARGV[1]) then
  fence = tonumber(ARGV[1]) + 1
  redis.call('SET', KEYS[2], fence)
end
local value = fence .. ' ' .. ARGV[2] .. ' ' .. ARGV[3]
redis.call('SET', KEYS[1], value, 'PX', ARGV[4])
return {1, value, tonumber(ARGV[4])}
"""
"""Take the lock if nobody has it. Keys: lock, fence. Arguments: highest fence seen, nonce, url, TTL in ms."""

RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
"""Keep the lock. Keys: lock. Arguments: value, TTL in ms."""

RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('DEL', KEYS[1])
local seq = redis.call('INCR', KEYS[3])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', 'seq', seq, 'ids', '[]')
return 1
"""
"""Give the lock back and wake whoever follows the log. Keys: lock, log, seq. Arguments: value, length of the log."""

WRITE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('FENCED this broker does not lead any more')
end
local at = 4
local function each(command, key, width)
  local count = tonumber(ARGV[at])
  at = at + 1
  for _ = 1, count do
    if width == 2 then
      redis.call(command, key, ARGV[at], ARGV[at + 1])
    else
      redis.call(command, key, ARGV[at])
    end
    at = at + width
  end
end
each('HSET', KEYS[2], 2)
each('HDEL', KEYS[2], 1)
each('HSET', KEYS[4], 2)
each('HDEL', KEYS[4], 1)
each('SADD', KEYS[3], 1)
each('SREM', KEYS[3], 1)
each('HSET', KEYS[7], 2)
each('HDEL', KEYS[7], 1)
local seq = redis.call('INCR', KEYS[6])
redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[2], '*', 'seq', seq, 'ids', ARGV[3])
return seq
"""
"""Write one group, if the lock is still the writer's.

Keys: lock, leases, drains, engines, log, seq, candidates. Arguments: value, length of the log, ids of the leases as
JSON, then per kind a count and what to store or drop. Writing the same group twice changes nothing but the log, and
whoever follows the log reads rows as they are now, so a group may be sent again after a lost answer.
"""
