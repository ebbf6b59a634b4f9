package sys

import (
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// ReadMemory copies up to len(buf) bytes from an address of the thread's memory and returns how many were mapped. It goes through
// /proc, which works where a filter refuses process_vm_readv. It needs the right to attach to that thread with ptrace.
func ReadMemory(tid int, addr uint64, buf []byte) (int, error) {
	if len(buf) == 0 {
		return 0, nil
	}
	if addr > math.MaxInt64 {
		return 0, unix.EFAULT // pread takes a signed offset; no user address is that high
	}
	// Not os.Open, which spends three more calls on the poller.
	fd, err := retry(func() (int, error) {
		return unix.Open(fmt.Sprintf("/proc/%d/mem", tid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return 0, os.NewSyscallError("open /proc/TID/mem", err)
	}
	defer unix.Close(fd)
	n, err := retry(func() (int, error) { return unix.Pread(fd, buf, int64(addr)) })
	if err == unix.EIO {
		return 0, unix.EFAULT // how /proc says that the address isn't mapped
	}
	return max(n, 0), os.NewSyscallError("pread", err)
}
