/*
 * Fixed work with a checksum, one workload after the other. The same static file runs natively and as process 1 of a
 * guest. Prints lines that begin with "bench":
 *
 *   bench ready
 *   bench NAME NANOSECONDS CHECKSUM [INSTRUCTIONS]      INSTRUCTIONS only where they are known exactly
 *   bench end
 *
 * Arguments, or words of the kernel's command line as bench.scale= and bench.only=: scale=N (default 1) multiplies the
 * work, only=a,b picks workloads. A checksum depends on the scale and on nothing else.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static unsigned scale = 1;

static void check(int ok, const char *what) {
    if (ok) return;
    printf("bench failed: ");
    fflush(stdout);
    perror(what);
    exit(1);
}

static uint64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * UINT64_C(1000000000) + t.tv_nsec;
}

/* A Weyl sequence through a multiplicative hash (Steele, Lea, Flood: SplitMix, 2014). */
static uint64_t draw(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static uint64_t fold(uint64_t sum, uint64_t value) { return (sum << 9 | sum >> 55) * 5 ^ value; }

static uint64_t fold_double(uint64_t sum, double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return fold(sum, bits);
}

/* Eight instructions a turn in registers; how many is known exactly. */
#define TURNS 8000000u
static uint64_t turn_loop(uint64_t turns) {
    uint64_t a = 1, b = 2, c = 3;
    asm volatile("1: addq %1, %0; xorq %2, %1; leaq 7(%2,%0), %2; rolq $5, %0\n"
                 "subq %2, %1; imulq $3, %0, %0; decq %3; jnz 1b"
                 : "+r"(a), "+r"(b), "+r"(c), "+r"(turns)::"cc");
    return a ^ b ^ c;
}
static uint64_t loop(void) { return turn_loop((uint64_t)TURNS * scale); }

/* Arithmetic, branches that no predictor learns, multiplication and division. */
static uint64_t registers(void) {
    uint64_t state = 1, sum = 0;
    for (unsigned i = 0; i < 1500000 * scale; i++) {
        uint64_t x = draw(&state);
        if (x & 64) sum += x / ((x >> 50) | 1);
        else if (x & 128) sum -= (x >> 7) * 13;
        else sum ^= x << (x & 31);
    }
    return sum;
}

/* Scalar double precision: a planet's path by leapfrog steps, with square roots and divisions. */
static uint64_t floating(void) {
    double x = 1, y = 0, u = 0, v = 1.1;
    const double step = 1.0 / 4096;
    uint64_t sum = 0;
    for (unsigned i = 0; i < 700000 * scale; i++) {
        double r2 = x * x + y * y, pull = -step / (r2 * __builtin_sqrt(r2));
        u += x * pull, v += y * pull;
        x += u * step, y += v * step;
        if (i % 65536 == 0) sum = fold_double(fold_double(sum, x), v);
    }
    return fold_double(sum, y);
}

/* 128-bit vectors of integers and of single precision. */
typedef uint32_t words4 __attribute__((vector_size(16)));
typedef float floats4 __attribute__((vector_size(16)));
static uint64_t simd(void) {
    enum { COUNT = 2048 };
    static words4 words[COUNT];
    static floats4 floats[COUNT];
    uint64_t state = 7, sum = 0;
    for (int i = 0; i < COUNT; i++) {
        uint64_t a = draw(&state), b = draw(&state);
        words[i] = (words4){a, a >> 32, b, b >> 32};
        floats[i] = (floats4){a % 1000, b % 1000, a >> 60, b >> 60} / 16.0f;
    }
    for (unsigned round = 0; round < 5000 * scale; round++) {
        words4 carry = {round, 1, 2, 3};
        floats4 blend = {0.5f, 0.25f, 0.75f, 0.125f};
        for (int i = 0; i < COUNT; i++) {
            carry = (words[i] ^ carry) + (words[i] >> 3);
            words[i] += __builtin_shuffle(carry, (words4){1, 2, 3, 0});
            floats[i] = floats[i] * blend + (1.0f - blend);
        }
        sum = fold(sum, carry[0] ^ (uint64_t)carry[3] << 32);
    }
    for (int i = 0; i < COUNT; i++) sum = fold(sum, (uint64_t)(floats[i][0] * 4096) + (uint64_t)(floats[i][2] * 4096));
    return sum;
}

/* Loads that wait for each other: a random ring through 2 MiB. */
static uint64_t pointers(void) {
    enum { COUNT = 1 << 18 };
    static uint64_t *ring[COUNT];
    uint32_t *order = malloc(COUNT * sizeof *order);
    check(order != NULL, "malloc");
    uint64_t state = 3, sum = 0;
    for (uint32_t i = 0; i < COUNT; i++) order[i] = i;
    for (uint32_t i = COUNT - 1; i > 0; i--) {
        uint32_t other = draw(&state) % i, kept = order[i];
        order[i] = order[other], order[other] = kept;
    }
    for (uint32_t i = 0; i < COUNT; i++) ring[order[i]] = (uint64_t *)&ring[order[(i + 1) % COUNT]];
    free(order);
    uint64_t **at = ring;
    for (unsigned i = 0; i < 2000000 * scale; i++) {
        at = (uint64_t **)*at;
        if (i % 4096 == 0) sum = fold(sum, at - ring);
    }
    return sum;
}

/* The C library's string functions on short and on long strings. */
static uint64_t strings(void) {
    enum { SIZE = 1 << 16 };
    static char text[SIZE + 1], copy[SIZE + 1];
    uint64_t state = 5, sum = 0;
    for (int i = 0; i < SIZE; i++) text[i] = draw(&state) % 9 ? 'a' + draw(&state) % 20 : ' ';
    for (unsigned round = 0; round < 80 * scale; round++) {
        memcpy(copy, text, sizeof copy);
        text[round * 997 % SIZE] = 'a' + round % 20;
        sum = fold(sum, strlen(copy) + (memcmp(copy, text, SIZE) > 0));
        for (char *word = copy, *end; (end = strchr(word, ' ')); word = end + 1) {
            *end = 0;
            sum += strlen(word) * (strcmp(word, "mother") < 0 ? 3 : 5) + (strstr(word, "nd") != NULL);
        }
        memset(copy, 'x', SIZE / 2);
        sum = fold(sum, (char *)memchr(copy, 0, SIZE + 1) - copy);
    }
    return sum;
}

/* Calls and returns, deep and through pointers. */
static __attribute__((noinline)) uint64_t ackermann(uint64_t m, uint64_t n) {
    if (m == 0) return n + 1;
    asm volatile("" : "+r"(m));
    return ackermann(m - 1, n ? ackermann(m, n - 1) : 1);
}
static uint64_t add(uint64_t a, uint64_t b) { return a + b; }
static uint64_t twist(uint64_t a, uint64_t b) { return (a ^ b) * 3; }
static uint64_t spread(uint64_t a, uint64_t b) { return a << 1 ^ b >> 1; }
static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b + 1; }
static uint64_t calls(void) {
    static uint64_t (*volatile const table[])(uint64_t, uint64_t) = {add, twist, spread, least};
    uint64_t state = 9, sum = 0;
    for (unsigned round = 0; round < scale; round++) {
        sum += ackermann(2, 600) + ackermann(3, 6);
        for (int i = 0; i < 1000000; i++) {
            uint64_t x = draw(&state);
            sum = table[x & 3](sum, x);
        }
    }
    return sum;
}

static uint64_t system_calls(void) {
    uint64_t sum = 0;
    for (unsigned i = 0; i < 100000 * scale; i++) sum += syscall(SYS_umask, 022) == 022;
    return sum;
}

/* First touches of fresh pages, and write faults on pages that were made read-only. */
static uint64_t faults(void) {
    enum { PAGES = 512 };
    uint64_t sum = 0;
    for (unsigned round = 0; round < 12 * scale; round++) {
        unsigned char *area = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(area != MAP_FAILED, "mmap");
        for (int i = 0; i < PAGES; i++) sum += area[i * 4096 + 7];
        check(mprotect(area, PAGES * 2048, PROT_READ) == 0, "mprotect");
        for (int i = PAGES / 2; i < PAGES; i++) area[i * 4096] = round + i;
        check(mprotect(area, PAGES * 2048, PROT_READ | PROT_WRITE) == 0, "mprotect");
        for (int i = 0; i < PAGES; i++) area[i * 4096 + 1] = i, sum = fold(sum, area[i * 4096]);
        check(munmap(area, PAGES * 4096) == 0, "munmap");
    }
    return sum;
}

static uint64_t processes(void) {
    uint64_t sum = 0;
    for (unsigned i = 0; i < 120 * scale; i++) {
        pid_t child = fork();
        check(child >= 0, "fork");
        if (child == 0) _exit((i * 7 + 1) & 127);
        int status;
        check(waitpid(child, &status, 0) == child, "waitpid");
        sum = fold(sum, WEXITSTATUS(status));
    }
    return sum;
}

/* One byte to and fro between two processes. */
static uint64_t switches(void) {
    int there[2], back[2];
    const unsigned turns = 2500 * scale;
    check(pipe(there) == 0 && pipe(back) == 0, "pipe");
    pid_t child = fork();
    check(child >= 0, "fork");
    if (child == 0) {
        close(there[1]), close(back[0]);
        for (uint8_t byte; read(there[0], &byte, 1) == 1;) {
            byte = byte * 5 + 1;
            if (write(back[1], &byte, 1) != 1) break;
        }
        _exit(0);
    }
    close(there[0]), close(back[1]);
    uint64_t sum = 0;
    uint8_t byte = 1;
    for (unsigned i = 0; i < turns; i++) {
        check(write(there[1], &byte, 1) == 1 && read(back[0], &byte, 1) == 1, "pipe");
        sum = fold(sum, byte);
    }
    close(there[1]), close(back[0]);
    check(waitpid(child, NULL, 0) == child, "waitpid");
    return sum;
}

/* A file in memory: written in pieces, read at random places, cut, mapped. */
static uint64_t files(void) {
    enum { PIECE = 8192, PIECES = 256 };
    static unsigned char buffer[PIECE];
    uint64_t state = 11, sum = 0;
    for (unsigned round = 0; round < 8 * scale; round++) {
        int file = memfd_create("bench", MFD_CLOEXEC);
        check(file >= 0, "memfd_create");
        for (int i = 0; i < PIECES; i++) {
            memset(buffer, i + round, PIECE);
            check(write(file, buffer, PIECE) == PIECE, "write");
        }
        for (int i = 0; i < 2000; i++) {
            check(pread(file, buffer, 100, draw(&state) % (PIECE * PIECES - 100)) == 100, "pread");
            sum = fold(sum, buffer[0] + buffer[99]);
        }
        check(ftruncate(file, PIECE * PIECES / 2) == 0, "ftruncate");
        unsigned char *map = mmap(NULL, PIECE * PIECES / 2, PROT_READ, MAP_SHARED, file, 0);
        check(map != MAP_FAILED, "mmap");
        for (int i = 0; i < PIECE * PIECES / 2; i += 512) sum += map[i];
        munmap(map, PIECE * PIECES / 2);
        close(file);
    }
    return sum;
}

/* Two threads at one lock and one atomic word. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t shared_sum, shared_count;
static void *contend(void *number) {
    for (unsigned i = 0; i < 100000 * scale; i++) {
        pthread_mutex_lock(&lock);
        shared_sum += i ^ (uintptr_t)number;
        pthread_mutex_unlock(&lock);
        __atomic_fetch_add(&shared_count, 3, __ATOMIC_SEQ_CST);
    }
    return NULL;
}
static void in_two_threads(void *(*run)(void *), void *results[2]) {
    pthread_t threads[2];
    for (uintptr_t i = 0; i < 2; i++) check(pthread_create(&threads[i], NULL, run, (void *)i) == 0, "pthread_create");
    for (int i = 0; i < 2; i++) pthread_join(threads[i], &results[i]);
}
static uint64_t threads(void) {
    void *results[2];
    shared_sum = shared_count = 0;
    in_two_threads(contend, results);
    return fold(shared_sum, shared_count);
}

/* Work that shares nothing: alone in one thread, and the same in each of two, on CPUs of their own if there are two. */
static void *own_work(void *number) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((uintptr_t)number, &set);
    sched_setaffinity(0, sizeof set, &set);
    return (void *)turn_loop((uint64_t)TURNS * scale);
}
static uint64_t alone(void) {
    void *result;
    pthread_t thread;
    check(pthread_create(&thread, NULL, own_work, NULL) == 0, "pthread_create");
    pthread_join(thread, &result);
    return (uint64_t)result;
}
static uint64_t pair(void) {
    void *results[2];
    in_two_threads(own_work, results);
    return (uint64_t)results[0] + (uint64_t)results[1];
}

static const struct {
    const char *name;
    uint64_t (*run)(void);
    uint64_t instructions;
} workloads[] = {
    {"loop", loop, UINT64_C(8) * TURNS}, {"registers", registers, 0}, {"floating", floating, 0}, {"simd", simd, 0},
    {"pointers", pointers, 0}, {"strings", strings, 0}, {"calls", calls, 0}, {"system_calls", system_calls, 0},
    {"faults", faults, 0}, {"processes", processes, 0}, {"switches", switches, 0}, {"files", files, 0},
    {"threads", threads, 0}, {"alone", alone, 0}, {"pair", pair, 0},
};

static int wanted(const char *only, const char *name) {
    size_t length = strlen(name);
    if (!*only) return 1;
    for (const char *at = only; (at = strstr(at, name)); at += length)
        if ((at == only || at[-1] == ',') && (at[length] == ',' || !at[length])) return 1;
    return 0;
}

int main(int count, char **arguments) {
    static char line[4096];
    const char *only = "";
    const int first = getpid() == 1;
    if (first) {
        check(mount("proc", "/proc", "proc", 0, NULL) == 0, "mount /proc");
        int file = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
        check(file >= 0 && read(file, line, sizeof line - 1) > 0, "/proc/cmdline");
        close(file);
        for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n")) {
            if (!strncmp(word, "bench.scale=", 12)) scale = atoi(word + 12);
            if (!strncmp(word, "bench.only=", 11)) only = word + 11;
        }
    }
    for (int i = 1; i < count && !first; i++) {
        if (!strncmp(arguments[i], "scale=", 6)) scale = atoi(arguments[i] + 6);
        else if (!strncmp(arguments[i], "only=", 5)) only = arguments[i] + 5;
        else return fprintf(stderr, "bench: %s: expected scale=N or only=a,b\n", arguments[i]), 2;
    }
    if (scale < 1) scale = 1;
    umask(022);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("bench ready");
    for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++) {
        if (!wanted(only, workloads[i].name)) continue;
        uint64_t start = nanoseconds(), sum = workloads[i].run(), took = nanoseconds() - start;
        printf("bench %s %llu %016llx", workloads[i].name, (unsigned long long)took, (unsigned long long)sum);
        if (workloads[i].instructions) printf(" %llu", (unsigned long long)workloads[i].instructions * scale);
        putchar('\n');
    }
    puts("bench end");
    if (first) {
        tcdrain(1);
        reboot(RB_POWER_OFF);
    }
    return 0;
}
