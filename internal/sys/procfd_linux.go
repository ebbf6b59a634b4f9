package sys

import (
	"encoding/binary"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// SocketFiles calls f with each descriptor of the process that is a socket, and the socket's inode.
// It is made for processes with tens of thousands of descriptors: two system calls for each, and no allocation.
func SocketFiles(pid int, f func(fd int, inode uint64)) error {
	path := "/proc/" + strconv.Itoa(pid) + "/fd"
	dir, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(dir)
	buf := make([]byte, 32<<10)
	for {
		n, err := retry(func() (int, error) { return unix.Getdents(dir, buf) })
		if err != nil {
			return os.NewSyscallError("getdents64", err)
		}
		if n <= 0 {
			return nil
		}
		for entries := buf[:n]; len(entries) > 0; {
			const header = int(unsafe.Offsetof(unix.Dirent{}.Name))
			size := int(binary.NativeEndian.Uint16(entries[unsafe.Offsetof(unix.Dirent{}.Reclen):]))
			name := entries[header:size]
			entries = entries[size:]
			if fd, ok := number(name, 0); ok {
				if inode, ok := socketInode(dir, &name[0]); ok {
					f(int(fd), inode)
				}
			}
		}
	}
}

// socketInode reads a link such as "socket:[4711]"; name ends with a zero byte.
func socketInode(dir int, name *byte) (uint64, bool) {
	const prefix = "socket:["
	var link [len(prefix) + 21]byte
	n, _, errno := unix.Syscall6(unix.SYS_READLINKAT, uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(unsafe.Pointer(&link)), uintptr(len(link)), 0, 0)
	if errno != 0 || int(n) <= len(prefix) || string(link[:len(prefix)]) != prefix {
		return 0, false
	}
	return number(link[len(prefix):n], ']')
}

// number reads decimal digits up to the end byte.
func number(b []byte, end byte) (n uint64, ok bool) {
	for i, c := range b {
		if c == end {
			return n, i > 0
		}
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + uint64(c-'0')
	}
	return 0, false
}
