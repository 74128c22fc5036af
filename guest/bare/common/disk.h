/* A virtio disk, as far as a program needs one: one request at a time, no interrupts (virtio 1.2, sections 4.1 and 5.2). */
#ifndef DISK_H
#define DISK_H
#include "bare.h"

/* Finds the first one and makes it ready; 0 if there is none. */
int disk_start(void);
/* Begins to read `sector` (of 512 bytes) to physical address `to`, and comes back before it is there. */
void disk_read(u64 sector, reg to);
/* Whether the last read is over. */
int disk_done(void);

#endif
