/*
 * A program that notices when it is not left alone: whether a step is skipped or repeated, a write lost or made twice, a
 * timer forgotten, a clock turned back.
 *
 *   steady chain STEPS          a checksum over integers, SSE, x87, an open file and a pipe; every clock, two timers
 *   steady blocks DEVICE ROUNDS numbered blocks written through to a disk and read back
 *
 * All lines but those about clocks and timers are the same in every run.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MIXES = 20000, PERIOD_MS = 20, SLOTS = 64, BLOCK = 4096, WORDS = BLOCK / 8 };

static void fail(const char *what) {
    printf("%s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
}

/* ---- clocks and timers */

static const struct {
    clockid_t id;
    const char *name;
} clocks[] = {{CLOCK_REALTIME, "real time"},
              {CLOCK_MONOTONIC, "monotonic"},
              {CLOCK_MONOTONIC_RAW, "raw monotonic"},
              {CLOCK_BOOTTIME, "boot time"}};
enum { CLOCKS = sizeof clocks / sizeof *clocks };

static int64_t now(clockid_t clock) {
    struct timespec time;
    if (clock_gettime(clock, &time)) fail("clock_gettime");
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

static unsigned look_at_clocks(void) {
    static int64_t last[CLOCKS];
    static uint64_t last_tsc;
    unsigned wrong = 0;
    for (int i = 0; i < CLOCKS; i++) {
        int64_t time = now(clocks[i].id);
        if (time < last[i]) {
            printf("clock: %s went back by %lld ns\n", clocks[i].name, (long long)(last[i] - time));
            wrong++;
        }
        last[i] = time;
    }
    uint64_t tsc = __builtin_ia32_rdtsc();
    if (tsc < last_tsc) {
        printf("clock: the TSC went back by %llu\n", (unsigned long long)(last_tsc - tsc));
        wrong++;
    }
    last_tsc = tsc;
    return wrong;
}

static volatile sig_atomic_t alarms;

static void on_alarm(int signal) {
    (void)signal;
    alarms++;
}

/* Expirations are all those of the time that has passed, none more and none less, and the alarm goes on. */
static unsigned look_at_timers(int timer, int64_t start) {
    uint64_t expired = 0;
    if (read(timer, &expired, 8) != 8) fail("timerfd");
    int64_t due = (now(CLOCK_MONOTONIC) - start) / (PERIOD_MS * 1000000ll);
    unsigned wrong = 0;
    if ((int64_t)expired < due - 1 || (int64_t)expired > due) {
        printf("timer: %llu expirations, not %lld\n", (unsigned long long)expired, (long long)due);
        wrong++;
    }
    int before = alarms;
    for (int64_t end = now(CLOCK_MONOTONIC) + 2000000000ll; alarms < before + 2 && now(CLOCK_MONOTONIC) < end;) continue;
    if (alarms < before + 2) {
        printf("timer: no alarm any more after %d\n", before);
        wrong++;
    }
    return wrong;
}

/* ---- the chain */

static int chain(uint64_t steps) {
    int pipe_ends[2], timer = timerfd_create(CLOCK_MONOTONIC, 0);
    char name[] = "/tmp/steady-XXXXXX";
    int file = mkstemp(name);
    if (file < 0 || unlink(name) || pipe(pipe_ends) || timer < 0) fail("set-up");
    struct itimerspec period = {{0, PERIOD_MS * 1000000}, {0, PERIOD_MS * 1000000}};
    struct itimerval alarm = {{0, 50000}, {0, 50000}};
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    int64_t start = now(CLOCK_MONOTONIC);
    if (timerfd_settime(timer, 0, &period, NULL) || sigaction(SIGALRM, &action, NULL) ||
        setitimer(ITIMER_REAL, &alarm, NULL))
        fail("timers");

    uint64_t hash = 1, from_pipe = 0, wrong = 0;
    double sse = 1;
    long double x87 = 1;
    if (write(pipe_ends[1], &hash, 8) != 8) fail("pipe");
    for (uint64_t step = 1; step <= steps; step++) {
        for (uint64_t i = 0; i < MIXES; i++) {
            hash = mix(hash, i);
            sse = sse * 1.0000001 + 1e-9;
            x87 = x87 * 1.0000001L + 1e-9L;
        }
        if (sse > 1e6) sse = 1, x87 = 1;
        double rounded = x87;
        uint64_t bits[2];
        memcpy(&bits[0], &sse, 8);
        memcpy(&bits[1], &rounded, 8);
        hash = mix(mix(hash, bits[0]), bits[1]);
        uint64_t read_back;
        if (read(pipe_ends[0], &from_pipe, 8) != 8 || write(pipe_ends[1], &hash, 8) != 8) fail("pipe");
        if (pwrite(file, &hash, 8, step * 8) != 8 || pread(file, &read_back, 8, step * 8) != 8) fail("file");
        if (read_back != hash) wrong++;
        hash = mix(hash, from_pipe);
        wrong += look_at_clocks();
        if (step % 50 == 0) {
            printf("step %llu %016llx\n", (unsigned long long)step, (unsigned long long)hash);
            fflush(stdout);
        }
    }
    uint64_t kept = 0, word;
    for (uint64_t step = 1; step <= steps; step++) {
        if (pread(file, &word, 8, step * 8) != 8) fail("file");
        kept = mix(kept, word);
    }
    wrong += look_at_timers(timer, start);
    printf("chain %016llx file %016llx wrong %llu\n", (unsigned long long)hash, (unsigned long long)kept,
           (unsigned long long)wrong);
    return wrong != 0;
}

/* ---- the blocks */

static void fill(uint64_t *block, uint64_t slot, uint64_t version) {
    for (int i = 0; i < WORDS; i++) block[i] = version ? mix(mix(slot, version), i) : 0;
    if (version) block[0] = version;
}

/* Compares a slot with the last version that was written to it. */
static unsigned check(int disk, uint64_t slot, uint64_t version, uint64_t *read_to, uint64_t *wanted) {
    if (pread(disk, read_to, BLOCK, slot * BLOCK) != BLOCK) fail("read");
    fill(wanted, slot, version);
    if (!memcmp(read_to, wanted, BLOCK)) return 0;
    printf("blocks: slot %llu has version %llu, not %llu\n", (unsigned long long)slot, (unsigned long long)read_to[0],
           (unsigned long long)version);
    return 1;
}

static int blocks(const char *device, uint64_t rounds) {
    static uint64_t versions[SLOTS];
    int disk = open(device, O_RDWR | O_DIRECT | O_SYNC);
    uint64_t *block = aligned_alloc(BLOCK, BLOCK), *other = aligned_alloc(BLOCK, BLOCK);
    if (disk < 0 || !block || !other) fail(device);
    uint64_t hash = 1, wrong = 0;
    for (uint64_t slot = 0; slot < SLOTS; slot++) {
        fill(block, slot, 0);
        if (pwrite(disk, block, BLOCK, slot * BLOCK) != BLOCK) fail("write");
    }
    for (uint64_t round = 1; round <= rounds; round++) {
        hash = mix(hash, round);
        uint64_t slot = hash % SLOTS, looked_at = (hash >> 32) % SLOTS;
        versions[slot] = round;
        fill(block, slot, round);
        if (pwrite(disk, block, BLOCK, slot * BLOCK) != BLOCK) fail("write");
        wrong += check(disk, looked_at, versions[looked_at], block, other);
    }
    for (uint64_t slot = 0; slot < SLOTS; slot++) wrong += check(disk, slot, versions[slot], block, other);
    printf("blocks %016llx wrong %llu\n", (unsigned long long)hash, (unsigned long long)wrong);
    return wrong != 0;
}

int main(int count, char **arguments) {
    if (count == 3 && !strcmp(arguments[1], "chain")) return chain(strtoull(arguments[2], NULL, 10));
    if (count == 4 && !strcmp(arguments[1], "blocks")) return blocks(arguments[2], strtoull(arguments[3], NULL, 10));
    fprintf(stderr, "usage: steady chain STEPS | steady blocks DEVICE ROUNDS\n");
    return 2;
}
