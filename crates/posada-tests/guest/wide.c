/*
 * AVX-512 as programs use it: the C library's string functions on text that ends where memory ends, loops that the compiler
 * makes 512 bits wide, compressed and scattered elements, opmasks that leave out what is not mapped; on several threads,
 * which a timer interrupts with a handler that overwrites vector and opmask registers.
 *
 *   wide THREADS     one checksum, the same in every run and on every processor with AVX-512
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>

enum { PAGE = 4096, COUNT = 4096, ROUNDS = 12, TEXTS = 1500, THREADS = 16, PERIOD_US = 1000 };

static uint64_t draw(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
}

static uint64_t sign(int value) { return value < 0 ? 1 : value > 0 ? 2 : 3; }
static uint64_t place(const char *found, const char *text) { return found ? (uint64_t)(found - text) : ~0ull; }

/* Two pages with nothing behind them. */
static char *pages(void) {
    char *start = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || munmap(start + 2 * PAGE, PAGE) != 0) abort();
    return start;
}

static uint64_t strings(uint64_t state) {
    char *start = pages(), *end = start + 2 * PAGE;
    static __thread char copy[1024];
    uint64_t hash = 0;
    for (int i = 0; i < TEXTS; i++) {
        size_t length = draw(&state) % 300;
        char *text = end - length - 1;
        for (size_t at = 0; at < length; at++) text[at] = 'a' + draw(&state) % 5;
        text[length] = 0;
        strcpy(copy, text);
        hash = mix(hash, strlen(text) ^ strnlen(text, length / 2) << 16);
        hash = mix(hash, place(strchr(text, 'c'), text) ^ place(strrchr(text, 'b'), text) << 32);
        hash = mix(hash, place(memchr(text, 'e', length), text) ^ strspn(text, "abc") << 32);
        if (length) copy[draw(&state) % length] ^= 1;
        hash = mix(hash, sign(strcmp(copy, text)) * 5 + sign(memcmp(copy, text, length + 1)));
        memmove(copy + 17, copy, length);
        memset(copy + 5, (int)length, length / 2);
        for (size_t at = 0; at < length; at++) hash = mix(hash, (unsigned char)copy[at]);
    }
    munmap(start, 2 * PAGE);
    return hash;
}

/* What an opmask leaves out does not fault. */
static uint64_t edges(uint64_t state) {
    char *start = pages(), *end = start + 2 * PAGE;
    uint64_t hash = 0;
    for (int left = 0; left < 64; left++) {
        __mmask64 mask = draw(&state) & ((1ull << left) - 1);
        __m512i value = _mm512_maskz_loadu_epi8(mask, end - left);
        value = _mm512_add_epi8(value, _mm512_set1_epi8((char)draw(&state)));
        _mm512_mask_storeu_epi8(end - left, mask, value);
        _mm512_mask_compressstoreu_epi32(end - left / 4 * 4, (__mmask16)((1u << left / 4) - 1), value);
    }
    for (char *at = end - 64; at < end; at++) hash = mix(hash, (unsigned char)*at);
    munmap(start, 2 * PAGE);
    return hash;
}

struct lanes {
    float a[COUNT], b[COUNT];
    double d[COUNT];
    int index[COUNT], out[COUNT + 16];
    uint8_t bytes[COUNT];
};

static uint64_t loops(uint64_t state) {
    struct lanes *l = calloc(1, sizeof *l);
    uint64_t hash = 0;
    if (!l) abort();
    for (int i = 0; i < COUNT; i++) {
        l->a[i] = (float)(draw(&state) % 2000) - 1000;
        l->b[i] = (float)(draw(&state) % 1000) / 7;
        l->d[i] = (double)(draw(&state) % 100000) / 3;
        l->index[i] = (int)(draw(&state) % COUNT);
        l->bytes[i] = (uint8_t)draw(&state);
    }
    for (int round = 0; round < ROUNDS; round++) {
        int kept = 0;
        for (int i = 0; i < COUNT; i++) l->a[i] = l->a[i] * 1.0001f + l->b[i];
        for (int i = 0; i < COUNT; i++)
            if (l->a[i] > 0) l->d[i] += l->a[i] * 0.5;
        for (int i = 0; i < COUNT; i++) l->b[i] = l->a[l->index[i]] * 0.25f + l->b[i] * 0.5f;
        for (int i = 0; i < COUNT; i++) l->bytes[i] = (uint8_t)(l->bytes[i] * 3 + l->bytes[COUNT - 1 - i]);
        for (int i = 0; i < COUNT; i += 16) {
            __m512 value = _mm512_loadu_ps(l->a + i);
            __mmask16 mask = _mm512_cmp_ps_mask(value, _mm512_set1_ps(100), _CMP_GT_OQ);
            _mm512_mask_compressstoreu_ps(l->out + kept, mask, value);
            kept += __builtin_popcount(mask);
        }
        hash = mix(hash, (uint64_t)kept);
        for (int i = 0; i < COUNT; i += 16)
            _mm512_mask_i32scatter_epi32(l->out, 0x5a5a, _mm512_loadu_si512(l->index + i), _mm512_set1_epi32(i), 4);
        for (int i = 0; i < COUNT; i++) hash = mix(hash, (uint32_t)l->out[i]);
    }
    for (int i = 0; i < COUNT; i++) {
        uint64_t wide;
        uint32_t narrow;
        memcpy(&wide, l->d + i, sizeof wide);
        memcpy(&narrow, l->b + i, sizeof narrow);
        hash = mix(mix(hash, wide), narrow ^ (uint64_t)l->bytes[i] << 32);
    }
    free(l);
    return hash;
}

static void overwrite(int signal) {
    (void)signal;
    __asm__ volatile("vpternlogd $255, %%zmm1, %%zmm1, %%zmm1\n\tvpxord %%zmm16, %%zmm16, %%zmm16\n\tkxnorq %%k3, %%k3, %%k3"
                     ::: "xmm1", "xmm16", "k3");
}

static void *thread(void *number) {
    uint64_t seed = (uint64_t)(uintptr_t)number * 7919, hash = 0;
    for (int i = 0; i < ROUNDS; i++) hash = mix(mix(mix(hash, loops(seed + i)), strings(seed + i)), edges(seed + i));
    return (void *)(uintptr_t)hash;
}

int main(int count, char **arguments) {
    int threads = count == 2 ? atoi(arguments[1]) : 0;
    if (threads < 1 || threads > THREADS) {
        fprintf(stderr, "wide THREADS, of which there may be %d\n", THREADS);
        return 2;
    }
    struct itimerval period = {{0, PERIOD_US}, {0, PERIOD_US}};
    signal(SIGALRM, overwrite);
    setitimer(ITIMER_REAL, &period, NULL);
    pthread_t all[THREADS];
    uint64_t hash = 0;
    for (int i = 0; i < threads; i++)
        if (pthread_create(all + i, NULL, thread, (void *)(uintptr_t)(i + 1)) != 0) abort();
    for (int i = 0; i < threads; i++) {
        void *result;
        pthread_join(all[i], &result);
        hash = mix(hash, (uint64_t)(uintptr_t)result);
    }
    printf("%016lx\n", hash);
    return 0;
}
