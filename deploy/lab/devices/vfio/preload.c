/*
 * Devices for an unmodified QEMU on a machine without VFIO: what a VFIO driver in the kernel would answer, a process of
 * ours answers.
 *
 * Loaded into QEMU with LD_PRELOAD. DROVER_VFIO=COUNT:SOCKET names how many devices there are and the unix socket of
 * their process. Before main() this file makes the descriptors that QEMU's command line names by number (layout.py):
 * one for `-object iommufd,fd=`, then one for each `-device vfio-pci,fd=`. A device's descriptor is a memfd that holds
 * its PCI configuration space, so QEMU's own accesses to that need no help. Then it steps in on
 *
 *   ioctl on the iommufd             answered here: mappings succeed, a device that does no DMA needs none
 *   ioctl on a device                asked of the process; an answer may open a data session: a new descriptor
 *   pread, pwrite on a device's BAR  asked of the process, on a connection of its own, so that a doorbell of the guest
 *                                    never waits behind a slow migration call
 *   ioctl, read, write, close on a   asked of the process
 *   data session
 *
 * and on nothing else. Each connection carries one question at a time (struct question, struct answer, layout.py has
 * the same), so the process sees what QEMU does in order and may answer as late as it likes; an answer that is held
 * back holds the thread that asked. When the process is gone every call fails with ENODEV, as for a device that was
 * pulled out.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/un.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* --- what layout.py knows as well, and of FIRST_FD agents/engine/qemu/vfio.py ---------------------------------------- */

enum { FIRST_FD = 400, MAX_DEVICES = 8 };
enum { BAR_BYTES = 4096, CONFIG_OFFSET = 1 << 20, CONFIG_BYTES = 4096 };
enum { HELLO = 1, DEVICE_IOCTL, DATA_IOCTL, DATA_READ, DATA_WRITE, DATA_CLOSE, BAR_READ, BAR_WRITE };
enum { OPENS_SESSION = 1 };

struct question {
    uint32_t kind;
    uint32_t number; /* of the ioctl or the device; bytes wanted by a read */
    uint32_t length; /* of the payload that follows */
    uint32_t offset; /* into the BAR */
};

struct answer {
    int32_t result; /* or minus errno */
    uint32_t flags;
    uint32_t length; /* of the payload that follows */
    uint32_t reserved;
};

/* --- descriptors ----------------------------------------------------------------------------------------------------- */

enum { MAX_FD = 4096, MAX_PAYLOAD = 4 << 20, MAX_ARGUMENT = 1 << 16 };
enum { NONE, IOMMU, DEVICE, DATA };

struct channel {
    int socket; /* -1: the process is gone */
    pthread_mutex_t lock;
};

static struct {
    struct channel control, doorbell;
} devices[MAX_DEVICES];

static _Atomic uint8_t kinds[MAX_FD], owners[MAX_FD];

static int kind_of(int fd) { return fd >= 0 && fd < MAX_FD ? kinds[fd] : NONE; }

static void know(int fd, int kind, int device)
{
    owners[fd] = (uint8_t)device;
    kinds[fd] = (uint8_t)kind;
}

static int (*libc_ioctl)(int, unsigned long, ...);
static ssize_t (*libc_read)(int, void *, size_t);
static ssize_t (*libc_write)(int, const void *, size_t);
static ssize_t (*libc_pread)(int, void *, size_t, off64_t);
static ssize_t (*libc_pwrite)(int, const void *, size_t, off64_t);
static int (*libc_close)(int);

static void *next(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (found)
        return found;
    fprintf(stderr, "drover-vfio: the C library has no %s\n", name);
    _exit(1);
}

/* Other libraries may call us from their own constructors, so this may not wait for ours. */
static void find_libc(void)
{
    if (libc_close)
        return;
    *(void **)&libc_ioctl = next("ioctl");
    *(void **)&libc_read = next("read");
    *(void **)&libc_write = next("write");
    *(void **)&libc_pread = next("pread64");
    *(void **)&libc_pwrite = next("pwrite64");
    *(void **)&libc_close = next("close");
}

/* --- asking the process ---------------------------------------------------------------------------------------------- */

static int send_all(int socket, struct iovec *parts, int count)
{
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)count};
    while (message.msg_iovlen) {
        ssize_t sent = sendmsg(socket, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return -1;
        while (message.msg_iovlen && (size_t)sent >= message.msg_iov->iov_len) {
            sent -= (ssize_t)message.msg_iov->iov_len;
            message.msg_iov++, message.msg_iovlen--;
        }
        if (message.msg_iovlen) {
            message.msg_iov->iov_base = (char *)message.msg_iov->iov_base + sent;
            message.msg_iov->iov_len -= (size_t)sent;
        }
    }
    return 0;
}

static int receive_all(int socket, void *into, size_t length)
{
    while (length) {
        ssize_t got = recv(socket, into, length, MSG_WAITALL);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return -1;
        into = (char *)into + got;
        length -= (size_t)got;
    }
    return 0;
}

/* One question and its answer; `room` bytes at `into` take the answer's payload. The result, or -1 with errno. */
static ssize_t ask(struct channel *channel, struct question question, const void *payload, void *into, size_t room,
                   uint32_t *flags)
{
    struct answer answer = {.result = -ENODEV};
    struct iovec parts[] = {{&question, sizeof question}, {(void *)payload, question.length}};

    pthread_mutex_lock(&channel->lock);
    if (channel->socket >= 0 &&
        (send_all(channel->socket, parts, question.length ? 2 : 1) ||
         receive_all(channel->socket, &answer, sizeof answer) || answer.length > room ||
         receive_all(channel->socket, into, answer.length))) {
        libc_close(channel->socket);
        channel->socket = -1;
        answer = (struct answer){.result = -ENODEV};
    }
    pthread_mutex_unlock(&channel->lock);
    if (flags)
        *flags = answer.flags;
    if (answer.result >= 0)
        return answer.result;
    errno = -answer.result;
    return -1;
}

/* --- ioctl ----------------------------------------------------------------------------------------------------------- */

/* The kernel's numbers: type ';', iommufd's from 0x80 on, VFIO's from 100 on. Every argument but that of RESET begins
 * with its own size. */
enum { DEVICE_RESET = 111 };
enum { IOMMU_DESTROY = 0x80, IOAS_ALLOC, IOAS_ALLOW_IOVAS, IOAS_COPY, IOAS_IOVA_RANGES, IOAS_MAP, IOAS_UNMAP };
enum { IOMMU_OPTION = 0x87, HWPT_ALLOC = 0x89, GET_HW_INFO = 0x8a, IOAS_MAP_FILE = 0x8f };

/* An address space that takes every mapping and translates nothing. */
static int iommu_ioctl(unsigned number, uint32_t *argument)
{
    static _Atomic uint32_t ids = 1;
    const uint64_t page = 4096;

    switch (number) {
    case IOAS_ALLOC: /* {size, flags, out id} */
        argument[2] = ids++;
        return 0;
    case HWPT_ALLOC: /* {size, flags, device, page table, out id, ...} */
        argument[4] = ids++;
        return 0;
    case IOAS_IOVA_RANGES: /* {size, id, in-out count, reserved, pointer, out alignment} */
        argument[2] = 0;
        memcpy((char *)argument + 24, &page, sizeof page);
        return 0;
    case GET_HW_INFO: /* {size, flags, device, length, pointer, out type, reserved, out capabilities} */
        if (argument[0] > 24)
            memset((char *)argument + 24, 0, argument[0] - 24);
        return 0;
    case IOMMU_DESTROY:
    case IOAS_MAP:
    case IOAS_UNMAP:
    case IOAS_MAP_FILE:
        return 0;
    }
    errno = ENOTTY;
    return -1;
}

/* The answer to the ioctl that opened a session names a descriptor: {size, flags, {state, data_fd}}. */
static int open_session(int device, void *argument, uint32_t size)
{
    int fd = eventfd(0, EFD_CLOEXEC);
    if (fd < 0)
        return -1;
    if (fd >= MAX_FD || size < 16) {
        libc_close(fd);
        errno = EMFILE;
        return -1;
    }
    know(fd, DATA, device);
    ((int32_t *)argument)[3] = fd;
    return 0;
}

static int device_ioctl(int fd, unsigned number, void *argument)
{
    int device = owners[fd], kind = kinds[fd] == DEVICE ? DEVICE_IOCTL : DATA_IOCTL;
    uint32_t size = number == DEVICE_RESET ? 0 : *(uint32_t *)argument, flags = 0;

    if (size > MAX_ARGUMENT) {
        errno = EINVAL;
        return -1;
    }
    struct question question = {.kind = (uint32_t)kind, .number = number, .length = size};
    ssize_t result = ask(&devices[device].control, question, argument, argument, size, &flags);
    if (result >= 0 && flags & OPENS_SESSION && open_session(device, argument, size))
        return -1;
    return (int)result;
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);

    find_libc();
    switch (kind_of(fd)) {
    case IOMMU:
        return iommu_ioctl(request & 0xff, argument);
    case DEVICE:
    case DATA:
        return device_ioctl(fd, request & 0xff, argument);
    }
    return libc_ioctl(fd, request, argument);
}

/* --- reading, writing, closing --------------------------------------------------------------------------------------- */

EXPORT ssize_t read(int fd, void *into, size_t length)
{
    find_libc();
    if (kind_of(fd) != DATA)
        return libc_read(fd, into, length);
    if (length > MAX_PAYLOAD)
        length = MAX_PAYLOAD;
    struct question question = {.kind = DATA_READ, .number = (uint32_t)length};
    return ask(&devices[owners[fd]].control, question, NULL, into, length, NULL);
}

EXPORT ssize_t write(int fd, const void *from, size_t length)
{
    find_libc();
    if (kind_of(fd) != DATA)
        return libc_write(fd, from, length);
    if (length > MAX_PAYLOAD)
        length = MAX_PAYLOAD;
    struct question question = {.kind = DATA_WRITE, .length = (uint32_t)length};
    return ask(&devices[owners[fd]].control, question, from, NULL, 0, NULL);
}

static int is_bar(int fd, size_t length, off64_t offset)
{
    return kind_of(fd) == DEVICE && offset >= 0 && length <= 8 && offset <= BAR_BYTES - (off64_t)length;
}

EXPORT ssize_t pread64(int fd, void *into, size_t length, off64_t offset)
{
    find_libc();
    if (!is_bar(fd, length, offset))
        return libc_pread(fd, into, length, offset);
    struct question question = {.kind = BAR_READ, .number = (uint32_t)length, .offset = (uint32_t)offset};
    return ask(&devices[owners[fd]].doorbell, question, NULL, into, length, NULL);
}

EXPORT ssize_t pwrite64(int fd, const void *from, size_t length, off64_t offset)
{
    find_libc();
    if (!is_bar(fd, length, offset))
        return libc_pwrite(fd, from, length, offset);
    struct question question = {.kind = BAR_WRITE, .length = (uint32_t)length, .offset = (uint32_t)offset};
    return ask(&devices[owners[fd]].doorbell, question, from, NULL, 0, NULL);
}

/* Other names of the same calls: of programs built for 64-bit files only, and of those built with fortified sources. */
EXPORT ssize_t pread(int fd, void *into, size_t length, off_t offset) { return pread64(fd, into, length, offset); }
EXPORT ssize_t pwrite(int fd, const void *from, size_t length, off_t offset) { return pwrite64(fd, from, length, offset); }

ssize_t __read_chk(int fd, void *into, size_t length, size_t room);
ssize_t __pread_chk(int fd, void *into, size_t length, off_t offset, size_t room);
ssize_t __pread64_chk(int fd, void *into, size_t length, off64_t offset, size_t room);

static void check_room(size_t length, size_t room)
{
    if (length > room)
        abort();
}

EXPORT ssize_t __read_chk(int fd, void *into, size_t length, size_t room)
{
    check_room(length, room);
    return read(fd, into, length);
}

EXPORT ssize_t __pread_chk(int fd, void *into, size_t length, off_t offset, size_t room)
{
    check_room(length, room);
    return pread64(fd, into, length, offset);
}

EXPORT ssize_t __pread64_chk(int fd, void *into, size_t length, off64_t offset, size_t room)
{
    check_room(length, room);
    return pread64(fd, into, length, offset);
}

EXPORT int close(int fd)
{
    find_libc();
    int kind = kind_of(fd);
    if (kind != NONE)
        know(fd, NONE, owners[fd]);
    if (kind == DATA)
        ask(&devices[owners[fd]].control, (struct question){.kind = DATA_CLOSE}, NULL, NULL, 0, NULL);
    return libc_close(fd);
}

/* --- before main() --------------------------------------------------------------------------------------------------- */

static void fail(const char *what, const char *about)
{
    fprintf(stderr, "drover-vfio: %s %s: %s\n", what, about, strerror(errno));
    _exit(1);
}

static void connect_channel(struct channel *channel, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        fail("cannot connect to the device process at", path);
    }
    strcpy(address.sun_path, path);
    pthread_mutex_init(&channel->lock, NULL);
    channel->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (channel->socket < 0 || connect(channel->socket, (struct sockaddr *)&address, sizeof address))
        fail("cannot connect to the device process at", path);
}

/* Give a descriptor the number that the command line names. */
static void place(int fd, int number, int kind, int device)
{
    if (fd < 0)
        fail("cannot make", "a descriptor for a device");
    if (fcntl(number, F_GETFD) != -1) {
        errno = EBUSY;
        fail("a descriptor that a device needs", "is taken");
    }
    if (dup3(fd, number, O_CLOEXEC) != number)
        fail("cannot place", "a descriptor for a device");
    libc_close(fd);
    know(number, kind, device);
}

static void attach(int device, const char *path)
{
    char config[CONFIG_BYTES] = {0};
    struct question hello = {.kind = HELLO, .number = (uint32_t)device};
    int fd = memfd_create("vfio-device", MFD_CLOEXEC);

    connect_channel(&devices[device].control, path);
    connect_channel(&devices[device].doorbell, path);
    if (ask(&devices[device].control, hello, NULL, config, sizeof config, NULL) < 0 ||
        ask(&devices[device].doorbell, hello, NULL, config, sizeof config, NULL) < 0)
        fail("the device process refuses a device at", path);
    if (ftruncate(fd, CONFIG_OFFSET + CONFIG_BYTES) ||
        libc_pwrite(fd, config, sizeof config, CONFIG_OFFSET) != (ssize_t)sizeof config)
        fail("cannot write", "a device's configuration space");
    place(fd, FIRST_FD + 1 + device, DEVICE, device);
}

/* A wrapper script around QEMU inherits the variables and loads this file too: only QEMU itself gets devices. */
__attribute__((constructor)) static void start(void)
{
    const char *wanted = getenv("DROVER_VFIO");
    char *rest;

    find_libc();
    if (!wanted || strncmp(program_invocation_short_name, "qemu-system", 11))
        return;
    long count = strtol(wanted, &rest, 10);
    if (count < 1 || count > MAX_DEVICES || *rest != ':') {
        errno = EINVAL;
        fail("DROVER_VFIO must be COUNT:SOCKET, not", wanted);
    }
    place(memfd_create("iommufd", MFD_CLOEXEC), FIRST_FD, IOMMU, 0);
    for (int device = 0; device < count; device++)
        attach(device, rest + 1);
}
