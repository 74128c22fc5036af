/* Drives a virtio disk on PCI by its first queue. */
#include "disk.h"

enum { VENDOR = 0x1af4, BLOCK = 0x1042, CAPABILITIES = 0x34, COMMAND = 0x04, BAR0 = 0x10, VENDOR_SPECIFIC = 9 };
/* Common configuration. */
enum {
    DRIVER_SELECT = 8, DRIVER_FEATURES = 12, MSIX_CONFIG = 16, STATUS = 20, QUEUE_SELECT = 22, QUEUE_SIZE = 24, QUEUE_MSIX = 26,
    QUEUE_ENABLE = 28, QUEUE_NOTIFY = 30, QUEUE_DESCRIPTORS = 32, QUEUE_AVAILABLE = 40, QUEUE_USED = 48,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NO_VECTOR = 0xffff, NEXT = 1, WRITE = 2, ENTRIES = 4 };

static struct {
    u64 address;
    u32 length;
    u16 flags, next;
} descriptors[ENTRIES] __attribute__((aligned(16)));
static volatile struct {
    u16 flags, index, ring[ENTRIES];
} available __attribute__((aligned(4)));
static volatile struct {
    u16 flags, index;
    struct {
        u32 id, length;
    } ring[ENTRIES];
} used __attribute__((aligned(4)));
static struct {
    u32 type, reserved;
    u64 sector;
} request;
static volatile u8 result;
static volatile u16 *doorbell;

static u32 pci_read(u32 function, u32 at) {
    out32(0xcf8, 0x80000000u | function << 8 | at);
    return in32(0xcfc);
}

static u32 find_function(void) {
    for (u32 device = 1; device < 32; device++)
        if (pci_read(device << 3, 0) == (VENDOR | BLOCK << 16))
            return device << 3;
    return 0;
}

/* Physical address of the structure of this kind; `at` is where its capability is. */
static reg structure(u32 function, u32 kind, u32 *at) {
    for (*at = pci_read(function, CAPABILITIES) & 0xff; *at; *at = pci_read(function, *at) >> 8 & 0xff) {
        u32 head = pci_read(function, *at);
        if ((head & 0xff) == VENDOR_SPECIFIC && head >> 24 == kind) {
            u32 bar = pci_read(function, *at + 4) & 0xff;
            return (pci_read(function, BAR0 + 4 * bar) & ~0xful) + pci_read(function, *at + 8);
        }
    }
    die("a virtio device lacks a structure");
}

#define AT(type, offset) (*(volatile type *)(common + (offset)))

int disk_start(void) {
    u32 function = find_function(), at;
    if (!function)
        return 0;
    out32(0xcf8, 0x80000000u | function << 8 | COMMAND);
    out32(0xcfc, 6); /* memory, bus mastering */
    reg common = structure(function, 1, &at), notify = structure(function, 2, &at);
    u32 multiplier = pci_read(function, at + 16);
    AT(u8, STATUS) = 0;
    AT(u8, STATUS) = ACKNOWLEDGE | DRIVER;
    AT(u32, DRIVER_SELECT) = 0;
    AT(u32, DRIVER_FEATURES) = 0;
    AT(u32, DRIVER_SELECT) = 1;
    AT(u32, DRIVER_FEATURES) = 1; /* VERSION_1 */
    AT(u8, STATUS) = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    AT(u16, MSIX_CONFIG) = NO_VECTOR;
    AT(u16, QUEUE_SELECT) = 0;
    AT(u16, QUEUE_SIZE) = ENTRIES;
    AT(u16, QUEUE_MSIX) = NO_VECTOR;
    AT(u32, QUEUE_DESCRIPTORS) = (reg)descriptors;
    AT(u32, QUEUE_DESCRIPTORS + 4) = 0;
    AT(u32, QUEUE_AVAILABLE) = (reg)&available;
    AT(u32, QUEUE_AVAILABLE + 4) = 0;
    AT(u32, QUEUE_USED) = (reg)&used;
    AT(u32, QUEUE_USED + 4) = 0;
    AT(u16, QUEUE_ENABLE) = 1;
    doorbell = (volatile u16 *)(notify + AT(u16, QUEUE_NOTIFY) * multiplier);
    AT(u8, STATUS) = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    return 1;
}

void disk_read(u64 sector, reg to) {
    request.sector = sector;
    descriptors[0] = (typeof(descriptors[0])){(reg)&request, sizeof(request), NEXT, 1};
    descriptors[1] = (typeof(descriptors[0])){to, 512, NEXT | WRITE, 2};
    descriptors[2] = (typeof(descriptors[0])){(reg)&result, 1, WRITE, 0};
    result = 0xff;
    available.ring[available.index % ENTRIES] = 0;
    asm volatile("" ::: "memory");
    available.index++;
    asm volatile("mfence" ::: "memory");
    *doorbell = 0;
}

int disk_done(void) { return used.index == available.index && !result; }
