package drain

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"github.com/berth-net/berth/internal/sys"
)

// A holder is a descriptor of a process.
type holder struct{ pid, fd int }

// A generation knows which of its processes holds which socket.
type generation struct {
	pids    func() ([]int, error)
	holders map[uint32]holder // by inode; one of them where workers share a socket
}

// walk reads the descriptors of all processes anew. A process that ends meanwhile holds nothing.
func (g *generation) walk() error {
	pids, err := g.pids()
	if err != nil {
		return fmt.Errorf("can't tell the generation's processes: %w", err)
	}
	clear(g.holders)
	for _, pid := range pids {
		err := sys.SocketFiles(pid, func(fd int, inode uint64) {
			g.holders[uint32(inode)] = holder{pid, fd} // sock_diag has 32 bits of it, and the kernel no more
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("can't tell the connections of process %d: %w", pid, err)
		}
	}
	return nil
}
