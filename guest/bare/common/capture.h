/* A trap handler that keeps what it saw and returns. */
#ifndef CAPTURE_H
#define CAPTURE_H
#include "bare.h"

/* What the last captured trap looked like from its handler; `resume_at` moves RIP where it is not 0. */
static volatile struct frame seen;
static volatile reg seen_end, seen_flags, seen_ss, seen_count;
static volatile reg resume_at;

static void capture(struct frame *f) {
    reg ss;
    asm volatile("mov %%ss, %0" : "=r"(ss));
    seen = *f;
    seen_end = (reg)(f + 1);
    seen_flags = get_flags();
    seen_ss = ss & 0xffff;
    seen_count++;
    if (resume_at)
        f->ip = resume_at;
    resume_at = 0;
}

#endif
