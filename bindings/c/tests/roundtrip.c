// Uses every function of the C interface once for what it promises and once for what it refuses. Exit status 0 means
// that all of it held; the first line that did not is printed.

// For nanosleep.
#define _POSIX_C_SOURCE 200809L

#include "mainstay.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHECK(condition)                                                                                               \
  do {                                                                                                                 \
    if (!(condition)) {                                                                                                \
      fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, #condition, mainstay_last_error());  \
      exit(1);                                                                                                         \
    }                                                                                                                  \
  } while (0)
#define OK(call) CHECK((call) == MAINSTAY_OK)

static const uint8_t *u8(const char *text) { return (const uint8_t *)text; }

static bool is(const MainstayBytes *bytes, const char *text) {
  return bytes->len == strlen(text) && memcmp(bytes->data, text, bytes->len) == 0;
}

static void put(MainstayKeyspace *keyspace, const char *key, const char *value) {
  OK(mainstay_put(keyspace, u8(key), strlen(key), u8(value), strlen(value)));
}

static void expect(MainstayKeyspace *keyspace, const char *key, const char *value) {
  MainstayBytes found;
  if (value == NULL) {
    CHECK(mainstay_get(keyspace, u8(key), strlen(key), &found) == MAINSTAY_NOT_FOUND);
    return;
  }
  OK(mainstay_get(keyspace, u8(key), strlen(key), &found));
  CHECK(is(&found, value));
  OK(mainstay_bytes_free(&found));
  OK(mainstay_bytes_free(&found)); // giving back twice is allowed
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  MainstayOptions options = {.memory_bytes = 64u << 20, .wal_bytes = 16u << 20, .backend = 2};
  MainstayStore *store = NULL;
  OK(mainstay_open(argv[1], &options, &store));

  // What is refused, with a code and a message.
  CHECK(mainstay_open(argv[1], &options, NULL) == MAINSTAY_INVALID);
  CHECK(mainstay_open(NULL, NULL, &store) == MAINSTAY_INVALID);
  CHECK(strstr(mainstay_last_error(), "path") != NULL);
  MainstayStore *second = NULL;
  CHECK(mainstay_open(argv[1], &options, &second) == MAINSTAY_LOCKED);
  CHECK(strlen(mainstay_last_error()) > 0);

  MainstayKeyspace *users = NULL, *posts = NULL;
  OK(mainstay_keyspace(store, "users", &users));
  OK(mainstay_keyspace(store, "posts", &posts));
  CHECK(mainstay_put(users, NULL, 0, u8("v"), 1) == MAINSTAY_INVALID);
  CHECK(mainstay_put(NULL, u8("k"), 1, u8("v"), 1) == MAINSTAY_INVALID);

  // Put, get, delete.
  put(users, "ada", "1815");
  put(users, "grace", "1906");
  put(users, "linus", "1969");
  expect(users, "ada", "1815");
  expect(users, "nobody", NULL);
  OK(mainstay_delete(users, u8("linus"), 5));
  expect(users, "linus", NULL);

  // A snapshot does not see what is written after it.
  MainstaySnapshot *before = NULL;
  OK(mainstay_snapshot(store, &before));
  CHECK(mainstay_snapshot_index(before) > 0);
  put(users, "ada", "changed");
  MainstayBytes found;
  OK(mainstay_snapshot_get(before, users, u8("ada"), 3, &found));
  CHECK(is(&found, "1815"));
  OK(mainstay_bytes_free(&found));
  expect(users, "ada", "changed");

  // Many keys at once, in their order.
  const uint8_t *keys[] = {u8("grace"), u8("nobody"), u8("ada")};
  const size_t key_lens[] = {5, 6, 3};
  MainstayBytes many[3];
  OK(mainstay_snapshot_multi_get(before, users, keys, key_lens, 3, many));
  CHECK(is(&many[0], "1906") && many[1].owner == NULL && many[1].data == NULL && is(&many[2], "1815"));
  for (size_t n = 0; n < 3; n++) {
    OK(mainstay_bytes_free(&many[n]));
  }
  OK(mainstay_snapshot_multi_get(before, users, NULL, NULL, 0, NULL));
  CHECK(mainstay_snapshot_multi_get(before, users, NULL, key_lens, 3, many) == MAINSTAY_INVALID);

  // A batch over two keyspaces.
  MainstayBatch *batch = NULL;
  OK(mainstay_batch_new(&batch));
  OK(mainstay_batch_put(batch, users, u8("alan"), 4, u8("1912"), 4));
  OK(mainstay_batch_put(batch, posts, u8("1"), 1, u8("hello"), 5));
  OK(mainstay_batch_delete(batch, users, u8("grace"), 5));
  expect(users, "alan", NULL);
  OK(mainstay_batch_commit(store, batch));
  mainstay_batch_free(batch);
  expect(users, "alan", "1912");
  expect(users, "grace", NULL);
  expect(posts, "1", "hello");

  // A range of keys, and all behind one; what comes behind it in its batch stays.
  put(posts, "2", "gone");
  put(posts, "3", "gone");
  OK(mainstay_batch_new(&batch));
  OK(mainstay_batch_delete_range(batch, posts, u8("2"), 1, NULL, 0));
  OK(mainstay_batch_put(batch, posts, u8("4"), 1, u8("kept"), 4));
  OK(mainstay_batch_commit(store, batch));
  expect(posts, "1", "hello");
  expect(posts, "2", NULL);
  expect(posts, "3", NULL);
  expect(posts, "4", "kept");
  OK(mainstay_batch_delete_range(batch, posts, u8("4"), 1, u8("5"), 1));
  OK(mainstay_batch_commit(store, batch));
  expect(posts, "4", NULL);
  CHECK(mainstay_batch_delete_range(batch, posts, u8("1"), 1, NULL, 1) == MAINSTAY_INVALID);
  OK(mainstay_batch_delete_range(batch, posts, u8("5"), 1, u8("4"), 1));
  CHECK(mainstay_batch_commit(store, batch) == MAINSTAY_INVALID);
  mainstay_batch_free(batch);

  // Operands, merged by an operator of the library.
  MainstayKeyspace *log = NULL;
  OK(mainstay_keyspace_with_operator(store, "log", "mainstay.append", 1, &log));
  CHECK(mainstay_keyspace_with_operator(store, "log", "mainstay.u64_add", 1, &log) == MAINSTAY_INVALID);
  CHECK(mainstay_keyspace_with_operator(store, "log", "nobody's", 1, &log) == MAINSTAY_INVALID);
  OK(mainstay_batch_new(&batch));
  OK(mainstay_batch_merge(batch, log, u8("day"), 3, u8("one"), 3));
  OK(mainstay_batch_merge(batch, log, u8("day"), 3, u8(" two"), 4));
  OK(mainstay_batch_commit(store, batch));
  expect(log, "day", "one two");
  OK(mainstay_batch_merge(batch, posts, u8("1"), 1, u8("x"), 1));
  CHECK(mainstay_batch_commit(store, batch) == MAINSTAY_INVALID);
  mainstay_batch_free(batch);
  mainstay_keyspace_free(log);

  // A keyspace with options of its own.
  MainstayKeyspaceOptions chosen = {.compression = 1, .block_bytes = 4096, .tiered_runs = 4};
  MainstayKeyspace *events = NULL;
  OK(mainstay_keyspace_with_options(store, "events", &chosen, &events));
  put(events, "first", "event");
  expect(events, "first", "event");
  mainstay_keyspace_free(events);
  chosen.tiered_runs = 1;
  CHECK(mainstay_keyspace_with_options(store, "events", &chosen, &events) == MAINSTAY_INVALID);
  chosen = (MainstayKeyspaceOptions){.compression = 4};
  CHECK(mainstay_keyspace_with_options(store, "events", &chosen, &events) == MAINSTAY_INVALID);
  CHECK(mainstay_keyspace_with_options(store, "events", NULL, &events) == MAINSTAY_INVALID);

  // Pairs that expire, in a keyspace of their own.
  MainstayKeyspace *sessions = NULL;
  OK(mainstay_keyspace_expiring(store, "sessions", &sessions));
  CHECK(mainstay_keyspace_expiring(store, "posts", &log) == MAINSTAY_INVALID);
  OK(mainstay_batch_new(&batch));
  OK(mainstay_batch_put_for(batch, sessions, u8("ada"), 3, u8("token"), 5, 3600000));
  OK(mainstay_batch_put_for(batch, sessions, u8("alan"), 4, u8("token"), 5, 1));
  OK(mainstay_batch_commit(store, batch));
  expect(sessions, "ada", "token");
  struct timespec pause = {0, 5000000};
  nanosleep(&pause, NULL);
  // A write moves the time.
  put(sessions, "grace", "token");
  expect(sessions, "alan", NULL);
  expect(sessions, "grace", "token");
  OK(mainstay_batch_put_for(batch, posts, u8("1"), 1, u8("x"), 1, 9));
  CHECK(mainstay_batch_commit(store, batch) == MAINSTAY_INVALID);
  mainstay_batch_free(batch);
  mainstay_keyspace_free(sessions);

  // Both ways over a range.
  MainstaySnapshot *now = NULL;
  MainstayIterator *iterator = NULL;
  MainstayBytes key, value;
  OK(mainstay_snapshot(store, &now));
  OK(mainstay_iterate(now, users, u8("a"), 1, u8("b"), 1, false, &iterator));
  OK(mainstay_iterator_next(iterator, &key, &value));
  CHECK(is(&key, "ada") && is(&value, "changed"));
  OK(mainstay_bytes_free(&key));
  OK(mainstay_bytes_free(&value));
  OK(mainstay_iterator_next(iterator, &key, NULL));
  CHECK(is(&key, "alan"));
  OK(mainstay_bytes_free(&key));
  CHECK(mainstay_iterator_next(iterator, &key, &value) == MAINSTAY_NOT_FOUND);
  mainstay_iterator_free(iterator);
  OK(mainstay_iterate(now, users, NULL, 0, NULL, 0, true, &iterator));
  OK(mainstay_iterator_next(iterator, &key, &value));
  CHECK(is(&key, "alan"));
  OK(mainstay_bytes_free(&key));
  OK(mainstay_bytes_free(&value));
  mainstay_iterator_free(iterator);

  // A checkpoint stays as it was; a clone of it is changed apart.
  OK(mainstay_checkpoint_create(store, "monday"));
  CHECK(mainstay_checkpoint_create(store, "monday") == MAINSTAY_INVALID);
  MainstayStore *clone = NULL;
  CHECK(mainstay_clone_create(store, "try", "tuesday", &clone) == MAINSTAY_NOT_FOUND);
  // Without a place for the handle nothing is made: the clone is not there, and valgrind finds nothing left behind.
  CHECK(mainstay_clone_create(store, "try", "monday", NULL) == MAINSTAY_INVALID);
  CHECK(mainstay_clone_open(store, "try", &clone) == MAINSTAY_NOT_FOUND);
  CHECK(mainstay_snapshot(store, NULL) == MAINSTAY_INVALID);
  CHECK(mainstay_get(users, u8("ada"), 3, NULL) == MAINSTAY_INVALID);
  OK(mainstay_clone_create(store, "try", "monday", &clone));
  MainstayKeyspace *clone_users = NULL;
  OK(mainstay_keyspace(clone, "users", &clone_users));
  put(clone_users, "ada", "in the clone");
  put(users, "ada", "in the store");
  expect(clone_users, "ada", "in the clone");
  expect(clone_users, "alan", "1912");
  expect(users, "ada", "in the store");
  MainstaySnapshot *monday = NULL;
  OK(mainstay_checkpoint_open(store, "monday", &monday));
  OK(mainstay_snapshot_get(monday, users, u8("ada"), 3, &found));
  CHECK(is(&found, "changed"));
  OK(mainstay_bytes_free(&found));
  mainstay_snapshot_free(monday);
  mainstay_keyspace_free(clone_users);
  mainstay_store_free(clone);
  OK(mainstay_clone_open(store, "try", &clone));
  mainstay_store_free(clone);
  OK(mainstay_clone_drop(store, "try"));
  CHECK(mainstay_clone_open(store, "try", &clone) == MAINSTAY_NOT_FOUND);
  OK(mainstay_checkpoint_drop(store, "monday"));

  // What was written is there after closing and opening again.
  mainstay_snapshot_free(before);
  mainstay_snapshot_free(now);
  mainstay_keyspace_free(users);
  mainstay_keyspace_free(posts);
  OK(mainstay_close(store));
  OK(mainstay_open(argv[1], &options, &store));
  OK(mainstay_keyspace(store, "users", &users));
  expect(users, "ada", "in the store");
  expect(users, "alan", "1912");
  mainstay_keyspace_free(users);
  OK(mainstay_close(store));
  OK(mainstay_close(NULL));

  puts("the C interface holds");
  return 0;
}
