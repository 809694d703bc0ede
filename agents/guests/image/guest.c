/*
 * The guest: dirties memory at a set rate, sleeps in between, checks every page it visits, uses its devices, and says on
 * its serial ports what it saw. It is the witness of every migration: lost, stale or foreign memory or device state shows
 * in its own counters.
 *
 * Command line (qemu -append), key=value separated by spaces:
 *   base=MiB   first MiB of the region                          (default 4)
 *   pages=N    4 KiB pages of the region that is dirtied        (default 1024)
 *   rate=N     pages dirtied per tick                           (default 16)
 *   hz=N       ticks per second, 19..1000                       (default 100)
 *   hb=N       a heartbeat every N ticks                        (default 10)
 *   fill=0|1   1: fill memory with incompressible bytes         (default 1)
 *   res=MiB    static memory after the region: filled once, never written again, checked by verify
 *   dev=N      devices on the second port, 0..8                 (default 0)
 *   devhz=N    a doorbell every N ticks for each device         (default 10)
 *
 * COM1, the console. Out: `BOOT pages rate hz`, `H beat sweeps errors rings device_errors device_retries`,
 * `E page got want`, `D device ring got want`, `V ok pages` or `V bad count`; all numbers are 8 hex digits.
 * In: `v` verify all memory, `+` `-` `0` double, halve, clear the dirty rate.
 *
 * COM2, the devices. Out: `R device ring`. In: `A device ring answer`. Device d holds a state that starts as
 * hash(0xD0000000 + d); ring n makes it hash(state ^ n), and that is the answer. A repeated ring gets the same answer.
 * Without an answer for two seconds the ring is repeated (bytes may be lost while the guest moves; that is no error).
 *
 * Page: word 0 counts visits, word 1 is hash(page), the rest is filler. A static page holds hash(page) in words 0 and 1 and
 * filler that is derived from its number, all of which verify computes again.
 */
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define COM1 0x3f8
#define COM2 0x2f8
#define MAX_DEVICES 8
#define WORDS 1024
#define RETRY_S 2

extern volatile u32 ticks;
extern void load_segments(void), timer_stub(void), other_stub(void);

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0,%1" ::"a"(value), "Nd"(port)); }
static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1,%0" : "=a"(value) : "Nd"(port));
    return value;
}

/* --- serial ports ------------------------------------------------------------------------------------------------ */

static void port_init(u16 port)
{
    outb(port + 1, 0);
    outb(port + 3, 0x80);
    outb(port, 1);
    outb(port + 1, 0);
    outb(port + 3, 3);
    outb(port + 2, 7);
}

/* Bounded: nobody may be reading, and the guest goes on all the same. */
static void put_char(u16 port, char c)
{
    for (u32 tries = 0; tries < 100000 && !(inb(port + 5) & 0x20); tries++)
        ;
    outb(port, c);
}

static void put_text(u16 port, const char *text)
{
    while (*text)
        put_char(port, *text++);
}

static void put_hex(u16 port, u32 value)
{
    put_char(port, ' ');
    for (int shift = 28; shift >= 0; shift -= 4)
        put_char(port, "0123456789abcdef"[(value >> shift) & 15]);
}

/* --- memory ------------------------------------------------------------------------------------------------------ */

static u32 base, pages, static_pages, rate, hz, fill, errors, next_page, sweeps;

static u32 hash(u32 x)
{
    x ^= x >> 16;
    x *= 0x7feb352dU;
    x ^= x >> 15;
    x *= 0x846ca68bU;
    x ^= x >> 16;
    return x;
}

static volatile u32 *page_at(u32 index) { return (volatile u32 *)(base + (index << 12)); }

static u32 filler(u32 index, u32 word) { return hash(index * WORDS + word) | 1; }

static void fill_memory(void)
{
    for (u32 i = 0; i < pages + static_pages; i++) {
        volatile u32 *page = page_at(i);
        for (u32 word = 2; fill && word < WORDS; word++)
            page[word] = filler(i, word);
        page[0] = i < pages ? 0 : hash(i);
        page[1] = hash(i);
    }
}

static void visit(u32 index)
{
    volatile u32 *page = page_at(index);
    if (page[0] != sweeps || page[1] != hash(index)) {
        if (errors++ < 20) {
            put_text(COM1, "E");
            put_hex(COM1, index);
            put_hex(COM1, page[0]);
            put_hex(COM1, sweeps);
            put_char(COM1, '\n');
        }
        page[1] = hash(index);
    }
    page[0] = sweeps + 1;
}

static void dirty(u32 count)
{
    while (count--) {
        visit(next_page);
        if (++next_page >= pages) {
            next_page = 0;
            sweeps++;
        }
    }
}

static u32 page_is_bad(u32 index)
{
    volatile u32 *page = page_at(index);
    u32 want = index < pages ? sweeps + (index < next_page) : hash(index);
    if (page[0] != want || page[1] != hash(index))
        return 1;
    for (u32 word = 2; fill && word < WORDS; word++)
        if (page[word] != filler(index, word))
            return 1;
    return 0;
}

static void verify(void)
{
    u32 bad = 0;
    for (u32 i = 0; i < pages + static_pages; i++)
        bad += page_is_bad(i);
    put_text(COM1, bad ? "V bad" : "V ok");
    put_hex(COM1, bad ? bad : pages + static_pages);
    put_char(COM1, '\n');
}

/* --- devices ----------------------------------------------------------------------------------------------------- */

static struct {
    u32 state, ring, rung_at;
    u8 waiting;
} devices[MAX_DEVICES];
static u32 device_count, device_period, rings, device_errors, device_retries;
static char line[64];
static u32 line_length;

static void ring(u32 d, u32 now)
{
    devices[d].waiting = 1;
    devices[d].rung_at = now;
    put_char(COM2, 'R');
    put_hex(COM2, d);
    put_hex(COM2, devices[d].ring);
    put_char(COM2, '\n');
}

static u32 number(const char **text)
{
    u32 value = 0;
    while (**text == ' ')
        (*text)++;
    for (;; (*text)++) {
        char c = **text;
        if (c >= '0' && c <= '9')
            value = value << 4 | (u32)(c - '0');
        else if (c >= 'a' && c <= 'f')
            value = value << 4 | (u32)(c - 'a' + 10);
        else
            return value;
    }
}

/* One line from the second port. An answer to another ring than the one that waits is an old one, and no news. */
static void answered(const char *text)
{
    if (*text++ != 'A')
        return;
    u32 d = number(&text), n = number(&text), got = number(&text);
    if (d >= device_count || !devices[d].waiting || n != devices[d].ring)
        return;
    u32 want = hash(devices[d].state ^ n);
    if (got != want && device_errors++ < 20) {
        put_text(COM1, "D");
        put_hex(COM1, d);
        put_hex(COM1, n);
        put_hex(COM1, got);
        put_hex(COM1, want);
        put_char(COM1, '\n');
    }
    devices[d].state = got; /* go on from what the device has, so that one loss counts once */
    devices[d].waiting = 0;
    rings++;
}

static void read_devices(void)
{
    for (u32 n = 0; n < 256 && inb(COM2 + 5) & 1; n++) {
        char c = inb(COM2);
        if (c == '\n') {
            line[line_length] = 0;
            answered(line);
            line_length = 0;
        } else if (line_length < sizeof line - 1) {
            line[line_length++] = c;
        }
    }
}

static void use_devices(u32 now)
{
    for (u32 d = 0; d < device_count; d++) {
        if (devices[d].waiting) {
            if (now - devices[d].rung_at >= RETRY_S * hz) {
                device_retries++;
                ring(d, now);
            }
        } else if (now % device_period == d % device_period) {
            devices[d].ring++;
            ring(d, now);
        }
    }
}

/* --- start and loop ---------------------------------------------------------------------------------------------- */

static u32 option(const char *text, const char *key, u32 value)
{
    while (text && *text) {
        const char *t = text, *k = key;
        while (*k && *t == *k)
            t++, k++;
        if (!*k && *t == '=') {
            for (value = 0, t++; *t >= '0' && *t <= '9'; t++)
                value = value * 10 + (u32)(*t - '0');
            return value;
        }
        while (*text && *text != ' ')
            text++;
        while (*text == ' ')
            text++;
    }
    return value;
}

static struct {
    u16 low, selector;
    u8 zero, type;
    u16 high;
} __attribute__((packed)) interrupts[256];

static void set_interrupt(int n, void (*stub)(void))
{
    u32 address = (u32)stub;
    interrupts[n].low = (u16)address;
    interrupts[n].selector = 8;
    interrupts[n].zero = 0;
    interrupts[n].type = 0x8e;
    interrupts[n].high = (u16)(address >> 16);
}

static void start_timer(void)
{
    static const u8 controllers[][2] = {{0x20, 0x11}, {0xa0, 0x11}, {0x21, 0x20}, {0xa1, 0x28}, {0x21, 4},
                                        {0xa1, 2},    {0x21, 1},    {0xa1, 1},    {0x21, 0xfe}, {0xa1, 0xff}};
    struct {
        u16 limit;
        u32 address;
    } __attribute__((packed)) table = {sizeof interrupts - 1, (u32)interrupts};
    for (int i = 0; i < 256; i++)
        set_interrupt(i, other_stub);
    set_interrupt(0x20, timer_stub);
    __asm__ volatile("lidt %0" ::"m"(table));
    for (u32 i = 0; i < sizeof controllers / 2; i++)
        outb(controllers[i][0], controllers[i][1]);
    u32 divisor = 1193182 / hz;
    outb(0x43, 0x34);
    outb(0x40, (u8)divisor);
    outb(0x40, (u8)(divisor >> 8));
}

static void read_console(void)
{
    while (inb(COM1 + 5) & 1) {
        char c = inb(COM1);
        if (c == 'v')
            verify();
        else if (c == '+')
            rate = rate ? rate * 2 : 1;
        else if (c == '-')
            rate /= 2;
        else if (c == '0')
            rate = 0;
    }
}

static void heartbeat(u32 beat)
{
    put_char(COM1, 'H');
    put_hex(COM1, beat);
    put_hex(COM1, sweeps);
    put_hex(COM1, errors);
    put_hex(COM1, rings);
    put_hex(COM1, device_errors);
    put_hex(COM1, device_retries);
    put_char(COM1, '\n');
}

void guest_main(u32 magic, const u32 *multiboot)
{
    const char *options = magic == 0x2BADB002 && multiboot[0] & 4 ? (const char *)multiboot[4] : "";
    port_init(COM1);
    port_init(COM2);
    base = option(options, "base", 4) << 20;
    pages = option(options, "pages", 1024);
    static_pages = option(options, "res", 0) << 8;
    rate = option(options, "rate", 16);
    hz = option(options, "hz", 100);
    hz = hz < 19 ? 19 : hz > 1000 ? 1000 : hz;
    fill = option(options, "fill", 1);
    device_count = option(options, "dev", 0);
    device_count = device_count > MAX_DEVICES ? MAX_DEVICES : device_count;
    device_period = option(options, "devhz", 10);
    device_period = device_period ? device_period : 1;
    u32 beat_period = option(options, "hb", 10), beats = 0, now = 0;
    beat_period = beat_period ? beat_period : 1;
    for (u32 d = 0; d < device_count; d++)
        devices[d].state = hash(0xD0000000U + d);
    load_segments();
    fill_memory();
    put_text(COM1, "BOOT");
    put_hex(COM1, pages);
    put_hex(COM1, rate);
    put_hex(COM1, hz);
    put_char(COM1, '\n');
    start_timer();
    for (;;) {
        __asm__ volatile("sti; hlt; cli");
        while (now != ticks) {
            now++;
            dirty(rate);
            if (now % beat_period == 0)
                heartbeat(++beats);
            use_devices(now);
        }
        read_devices();
        read_console();
    }
}
