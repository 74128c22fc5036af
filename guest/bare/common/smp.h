/* Application processors: start them, give them work. */
#ifndef SMP_H
#define SMP_H
#include "apic.h"

enum { MAX_CPUS = 8, WAKE_VECTOR = 0xe0 };
/* Processors that run, and which of them came up (a bit for each APIC id). */
extern u32 cpus;
extern volatile u32 online;

/* Starts all processors of the MADT; with one, or without a MADT, just that. */
void smp_start(void);
/* INIT and SIPI for one of them; 1 when it came up. */
int start_processor(u32 id);
/* Runs the job on all processors at once, with interrupts off, and waits. */
void on_all(void (*job)(u32 cpu));

#define atomic_add(at, value) __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST)
#define compiler_barrier() asm volatile("" ::: "memory")

/* Waits up to some seconds of TSC for a condition. */
#define PATIENCE 20000000000ull
#define wait_until(condition)                                                                                           \
    ({                                                                                                                  \
        u64 wait_start = rdtsc();                                                                                       \
        while (!(condition) && rdtsc() - wait_start < PATIENCE)                                                         \
            pause();                                                                                                    \
        (condition) != 0;                                                                                               \
    })

#endif
