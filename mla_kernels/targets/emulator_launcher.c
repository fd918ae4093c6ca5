/* Runs the programs of one emulated kernel. The emulator fills in the names between @ signs and links this with the
 * kernel's assembly. Each thread takes programs from a shared counter; what a program allocates comes from the thread's
 * arena and is gone when the program ends. */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

typedef struct { void *allocated, *aligned; int64_t offset, size, stride; } Memref;
extern void _mlir_ciface_kernel(@DECLARATION@);

#define THREADS 2
#define ARENA_BYTES (1UL << 34) /* reserved, not touched */
#define KEEP_BYTES (1UL << 26)  /* a thread that touched more gives its pages back after a launch */
#define SIZES 256               /* distinct sizes whose freed blocks are used again */

typedef struct Block { size_t bytes; struct Block *next; char pad[48]; } Block; /* 64 bytes in front of each block */
typedef struct { size_t bytes; Block *first; } FreeList;
typedef struct { char *base; size_t top, peak; jmp_buf exhausted; int failed; FreeList lists[SIZES]; int sizes; } Arena;
typedef struct { const uint64_t *args; int gx, gy, gz; long next, programs; } Launch;

static Arena arenas[THREADS];
static Launch current;
static __thread Arena *mine;
static pthread_mutex_t one_launch = PTHREAD_MUTEX_INITIALIZER;

static FreeList *list_of(size_t bytes) {
  for (int i = 0; i < mine->sizes; i++)
    if (mine->lists[i].bytes == bytes) return &mine->lists[i];
  if (mine->sizes == SIZES) return 0;
  mine->lists[mine->sizes] = (FreeList){bytes, 0};
  return &mine->lists[mine->sizes++];
}

void *emulator_malloc(size_t bytes) {
  bytes = (bytes + 63) & ~63UL;
  FreeList *list = list_of(bytes);
  if (list && list->first) {
    Block *again = list->first;
    list->first = again->next;
    return again + 1;
  }
  Block *block = (Block *)(mine->base + mine->top);
  mine->top += sizeof(Block) + bytes;
  if (mine->top > ARENA_BYTES) longjmp(mine->exhausted, 1);
  block->bytes = bytes;
  return block + 1;
}

void *emulator_calloc(size_t count, size_t bytes) { /* LLVM makes one of malloc and a fill with zeros */
  return memset(emulator_malloc(count * bytes), 0, count * bytes);
}

void emulator_free(void *pointer) {
  if (!pointer) return;
  Block *block = (Block *)pointer - 1;
  FreeList *list = list_of(block->bytes);
  if (!list) return;
  block->next = list->first;
  list->first = block;
}

static void *work(void *arena) {
  const uint64_t *a = current.args;
  const int gx = current.gx, gy = current.gy, gz = current.gz;
  Memref none = {0, 0, 0, 0, 1}, m[@COUNT@];
  (void)a; (void)m;
  @MEMREFS@
  mine = arena;
  mine->peak = 0;
  mine->failed = 0;
  if (!mine->base) {
    void *base = mmap(0, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) { mine->failed = 1; return 0; }
    mine->base = base;
  }
  if (setjmp(mine->exhausted)) { mine->failed = 1; return 0; }
  for (;;) {
    const long p = __atomic_fetch_add(&current.next, 1, __ATOMIC_RELAXED);
    if (p >= current.programs) break;
    mine->top = 0;
    mine->sizes = 0;
    _mlir_ciface_kernel(&none, &none, @ARGUMENTS@ gx, gy, gz, (int)(p % gx), (int)(p / gx % gy), (int)(p / gx / gy));
    if (mine->top > mine->peak) mine->peak = mine->top;
  }
  if (mine->peak > KEEP_BYTES) madvise(mine->base, mine->peak, MADV_DONTNEED);
  return 0;
}

/* Peak bytes that one program allocated, or -1 where they did not fit. */
long emulator_launch(const uint64_t *args, int gx, int gy, int gz, int threads) {
  pthread_t second;
  long peak;
  pthread_mutex_lock(&one_launch);
  current = (Launch){args, gx, gy, gz, 0, (long)gx * gy * gz};
  const int two = threads > 1 && current.programs > 1 && !pthread_create(&second, 0, work, &arenas[1]);
  work(&arenas[0]);
  if (two) pthread_join(second, 0);
  peak = arenas[0].peak;
  if (two && (long)arenas[1].peak > peak) peak = arenas[1].peak;
  if (arenas[0].failed || (two && arenas[1].failed)) peak = -1;
  pthread_mutex_unlock(&one_launch);
  return peak;
}

static volatile uint64_t *fault_address;

static void on_fault(int number, siginfo_t *info, void *context) {
  (void)context;
  *fault_address = (uint64_t)info->si_addr;
  signal(number, SIG_DFL); /* the access is tried again and kills the process */
}

/* From now on a wild access leaves its address in `slot` before it kills the process. */
void emulator_watch(volatile uint64_t *slot) {
  struct sigaction action = {0};
  fault_address = slot;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, 0);
  sigaction(SIGBUS, &action, 0);
}
