// The C interface of Mainstay, generated from bindings/c/src by cbindgen. Do not edit.
//
// Functions return a MainstayCode; MAINSTAY_OK is 0. After any other code, mainstay_last_error() says on the same thread
// what failed. Handles may be used from any thread; each is freed once, by its own function. Input is copied before return.


#ifndef MAINSTAY_H
#define MAINSTAY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// What a call answers. The code tells the caller what to do.
typedef enum MainstayCode {
  // Done.
  MAINSTAY_OK = 0,
  // Fix the call: a null argument, an empty key, a value over the limit, a name that is taken.
  MAINSTAY_INVALID = 1,
  // There is nothing under that name or key.
  MAINSTAY_NOT_FOUND = 2,
  // Go to the leader. It was not applied.
  MAINSTAY_NOT_LEADER = 3,
  // Try again: it was not applied.
  MAINSTAY_UNAVAILABLE = 4,
  // It may have been applied: read before trying again.
  MAINSTAY_INDETERMINATE = 5,
  // Free space; reads go on.
  MAINSTAY_OUT_OF_SPACE = 6,
  // Bytes do not match their checksum. Call an operator.
  MAINSTAY_CORRUPT = 7,
  // Not a volume, a newer format, or a volume of someone else.
  MAINSTAY_FOREIGN = 8,
  // Another process has the volume open.
  MAINSTAY_LOCKED = 9,
  // Not built yet.
  MAINSTAY_UNSUPPORTED = 10,
  // Closed; open again.
  MAINSTAY_CLOSED = 11,
  // The device failed.
  MAINSTAY_IO = 12,
  // A mistake in Mainstay.
  MAINSTAY_INTERNAL = 13,
  // A condition does not hold: nothing was applied; read again and retry.
  MAINSTAY_CONFLICT = 14,
} MainstayCode;

// Mutations collected for one commit.
typedef struct MainstayBatch MainstayBatch;

// An ordered scan.
typedef struct MainstayIterator MainstayIterator;

// A keyspace of a store.
typedef struct MainstayKeyspace MainstayKeyspace;

// Keeps borrowed bytes alive.
typedef struct MainstayOwner MainstayOwner;

// A read view at one index.
typedef struct MainstaySnapshot MainstaySnapshot;

// An open store.
typedef struct MainstayStore MainstayStore;

// Bytes that the library lends until [`mainstay_bytes_free`]; `data` is null for none.
typedef struct MainstayBytes {
  // The first byte.
  const uint8_t *data;
  // How many there are.
  size_t len;
  // For the library.
  struct MainstayOwner *owner;
} MainstayBytes;

// How to open a store. Zero in a field is its default.
typedef struct MainstayOptions {
  // Bytes for memtables, caches and buffers together.
  uint64_t memory_bytes;
  // Bytes of the log of a new volume.
  uint64_t wal_bytes;
  // Block I/O: 0 io_uring where it works, 1 io_uring or an error, 2 threads.
  uint32_t backend;
} MainstayOptions;

// What a keyspace may have otherwise than its store. Zero in a field is its default.
typedef struct MainstayKeyspaceOptions {
  // How blocks are compressed: 0 as in the store, 1 not at all, 2 lz4, 3 lz4 above the last level and zstd on it.
  uint32_t compression;
  // Bytes of a block of data before it is compressed, 1 KiB to 256 KiB.
  uint32_t block_bytes;
  // 0 for leveled compaction; 2 to 64 for tiered, with so many sorted runs at most.
  uint32_t tiered_runs;
} MainstayKeyspaceOptions;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Makes an empty batch. Freed with `mainstay_batch_free`.
enum MainstayCode mainstay_batch_new(struct MainstayBatch **out);

// Adds a put.
enum MainstayCode mainstay_batch_put(const struct MainstayBatch *batch,
                                     const struct MainstayKeyspace *keyspace,
                                     const uint8_t *key,
                                     size_t key_len,
                                     const uint8_t *value,
                                     size_t value_len);

// Adds a put for a time, in milliseconds from when the batch is applied, at least one. A keyspace that was not made for it
// (`mainstay_keyspace_expiring`) is `MAINSTAY_INVALID` when the batch is committed.
enum MainstayCode mainstay_batch_put_for(const struct MainstayBatch *batch,
                                         const struct MainstayKeyspace *keyspace,
                                         const uint8_t *key,
                                         size_t key_len,
                                         const uint8_t *value,
                                         size_t value_len,
                                         uint64_t ttl_ms);

// Adds a merge of an operand into the value of a key, absent or not, by the merge operator of the keyspace. An operand that the operator refuses, and
// a keyspace without one, are `MAINSTAY_INVALID` when the batch is committed.
enum MainstayCode mainstay_batch_merge(const struct MainstayBatch *batch,
                                       const struct MainstayKeyspace *keyspace,
                                       const uint8_t *key,
                                       size_t key_len,
                                       const uint8_t *operand,
                                       size_t operand_len);

// Adds a delete.
enum MainstayCode mainstay_batch_delete(const struct MainstayBatch *batch,
                                        const struct MainstayKeyspace *keyspace,
                                        const uint8_t *key,
                                        size_t key_len);

// Adds the removal of all keys from `start` up to `end`, which is not among them, however many there are. An empty `start` is the first key
// there can be. A null `end` with a length of 0 is none: all keys from `start` on; with another length it is `MAINSTAY_INVALID`. Bounds
// that hold no key, an `end` of 0 bytes that is not null among them, are `MAINSTAY_INVALID` when the batch is committed. It takes what
// was added before it, and nothing that is added later.
enum MainstayCode mainstay_batch_delete_range(const struct MainstayBatch *batch,
                                              const struct MainstayKeyspace *keyspace,
                                              const uint8_t *start,
                                              size_t start_len,
                                              const uint8_t *end,
                                              size_t end_len);

// Applies the batch all or none, durable on return, and empties it. On an error it keeps its mutations.
enum MainstayCode mainstay_batch_commit(const struct MainstayStore *store,
                                        const struct MainstayBatch *batch);

// Frees a batch; what was not committed is dropped.
void mainstay_batch_free(struct MainstayBatch *batch);

// Gives bytes back. `bytes` may be null or already given back.
enum MainstayCode mainstay_bytes_free(struct MainstayBytes *bytes);

// What failed last on this thread, as UTF-8 with a zero at its end; empty before the first failure. Valid until the
// next call into this library on the same thread.
const char *mainstay_last_error(void);

// Pins what is applied now. Freed with `mainstay_snapshot_free`.
enum MainstayCode mainstay_snapshot(const struct MainstayStore *store,
                                    struct MainstaySnapshot **out);

// Opens a checkpoint for reading. Freed with `mainstay_snapshot_free`.
enum MainstayCode mainstay_checkpoint_open(const struct MainstayStore *store,
                                           const char *name,
                                           struct MainstaySnapshot **out);

// Frees a snapshot.
void mainstay_snapshot_free(struct MainstaySnapshot *snapshot);

// The log index whose state the snapshot shows; 0 for a null snapshot.
uint64_t mainstay_snapshot_index(const struct MainstaySnapshot *snapshot);

// Reads a key as of the snapshot. `MAINSTAY_NOT_FOUND` if it is absent. Give `out` back with `mainstay_bytes_free`.
enum MainstayCode mainstay_snapshot_get(const struct MainstaySnapshot *snapshot,
                                        const struct MainstayKeyspace *keyspace,
                                        const uint8_t *key,
                                        size_t key_len,
                                        struct MainstayBytes *out);

// Reads `count` keys as of the snapshot, with what is not in memory read from the device together. `keys` and `key_lens` have one entry for each,
// and so has `out`: a key that is absent leaves `owner` null there. On an error nothing is lent. Give each of `out` back with
// `mainstay_bytes_free`.
enum MainstayCode mainstay_snapshot_multi_get(const struct MainstaySnapshot *snapshot,
                                              const struct MainstayKeyspace *keyspace,
                                              const uint8_t *const *keys,
                                              const size_t *key_lens,
                                              size_t count,
                                              struct MainstayBytes *out);

// Iterates over keys with `lower <= key < upper` as of the snapshot; a null bound is open. With `reverse` it begins at the
// high end. Freed with `mainstay_iterator_free`.
enum MainstayCode mainstay_iterate(const struct MainstaySnapshot *snapshot,
                                   const struct MainstayKeyspace *keyspace,
                                   const uint8_t *lower,
                                   size_t lower_len,
                                   const uint8_t *upper,
                                   size_t upper_len,
                                   bool reverse,
                                   struct MainstayIterator **out);

// The next pair. `MAINSTAY_NOT_FOUND` at the end. Give `key` and `value` back with `mainstay_bytes_free`; `value` may be null if
// it is not wanted.
enum MainstayCode mainstay_iterator_next(const struct MainstayIterator *iterator,
                                         struct MainstayBytes *key,
                                         struct MainstayBytes *value);

// Frees an iterator.
void mainstay_iterator_free(struct MainstayIterator *iterator);

// Opens the store at `path`, a directory (made if absent) or a block device. `options` may be null. The store is freed with
// `mainstay_close`.
enum MainstayCode mainstay_open(const char *path,
                                const struct MainstayOptions *options,
                                struct MainstayStore **out);

// Flushes, marks the volume clean and frees the store. Free keyspaces, snapshots and iterators first. Also after an error the
// handle is freed.
enum MainstayCode mainstay_close(struct MainstayStore *store);

// Opens a keyspace, made if it is absent. Freed with `mainstay_keyspace_free`.
enum MainstayCode mainstay_keyspace(const struct MainstayStore *store,
                                    const char *name,
                                    struct MainstayKeyspace **out);

// Opens a keyspace with a merge operator, made if it is absent, and given the operator if it has none. `mainstay.u64_add` version 1 adds
// numbers of 8 bytes little-endian and stays at the largest; `mainstay.append` version 1 appends. Others, and a keyspace that has
// another one, are `MAINSTAY_INVALID`. Freed with `mainstay_keyspace_free`.
enum MainstayCode mainstay_keyspace_with_operator(const struct MainstayStore *store,
                                                  const char *name,
                                                  const char *operator_name,
                                                  uint32_t version,
                                                  struct MainstayKeyspace **out);

// Opens a keyspace whose pairs can expire, made if it is absent. One that was not made so is `MAINSTAY_INVALID`. Freed with `mainstay_keyspace_free`.
enum MainstayCode mainstay_keyspace_expiring(const struct MainstayStore *store,
                                             const char *name,
                                             struct MainstayKeyspace **out);

// Opens a keyspace with these options in place of all that it had, made if it is absent. What is out of range is `MAINSTAY_INVALID`. Freed with
// `mainstay_keyspace_free`.
enum MainstayCode mainstay_keyspace_with_options(const struct MainstayStore *store,
                                                 const char *name,
                                                 const struct MainstayKeyspaceOptions *options,
                                                 struct MainstayKeyspace **out);

// Frees a keyspace handle; its data stays.
void mainstay_keyspace_free(struct MainstayKeyspace *keyspace);

// Sets a key, durable on return. The key has 1 byte to 64 KiB, the value at most 16 MiB.
enum MainstayCode mainstay_put(const struct MainstayKeyspace *keyspace,
                               const uint8_t *key,
                               size_t key_len,
                               const uint8_t *value,
                               size_t value_len);

// Reads a key. `MAINSTAY_NOT_FOUND` if it is absent. Give `out` back with `mainstay_bytes_free`.
enum MainstayCode mainstay_get(const struct MainstayKeyspace *keyspace,
                               const uint8_t *key,
                               size_t key_len,
                               struct MainstayBytes *out);

// Removes a key, durable on return; nothing if it is absent.
enum MainstayCode mainstay_delete(const struct MainstayKeyspace *keyspace,
                                  const uint8_t *key,
                                  size_t key_len);

// Freezes the store under a name: durable, and no data is copied.
enum MainstayCode mainstay_checkpoint_create(const struct MainstayStore *store, const char *name);

// Drops a checkpoint. Clones made from it stay.
enum MainstayCode mainstay_checkpoint_drop(const struct MainstayStore *store, const char *name);

// Makes a writable store from a checkpoint, without copying data. Freed with `mainstay_store_free`.
enum MainstayCode mainstay_clone_create(const struct MainstayStore *store,
                                        const char *name,
                                        const char *checkpoint,
                                        struct MainstayStore **out);

// Opens a clone by its name. Freed with `mainstay_store_free`.
enum MainstayCode mainstay_clone_open(const struct MainstayStore *store,
                                      const char *name,
                                      struct MainstayStore **out);

// Drops a clone and its data.
enum MainstayCode mainstay_clone_drop(const struct MainstayStore *store, const char *name);

// Frees the handle of a clone; the clone stays. The store itself is freed by `mainstay_close`.
void mainstay_store_free(struct MainstayStore *store);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MAINSTAY_H */
