package intercept

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/berth-net/berth/internal/sys"
)

// Listener receives the calls that a filter announces. Its methods may be used by several goroutines.
type Listener struct {
	file   *os.File
	err    error // why there is no file
	closed atomic.Bool

	recv sync.Mutex // held while receiving: two receivers could both see one notification, and one would block in the kernel
}

// NewListener takes ownership of the descriptor that [Filter.Install] returned. A descriptor that isn't one shows at the first Recv.
func NewListener(f *os.File) *Listener {
	file, err := sys.SeccompPollable(f)
	return &Listener{file: file, err: err}
}

// Recv waits for the next call, without a thread of its own. io.EOF: no task uses the filter any more. os.ErrClosed: Close was called.
// A caller that is killed before its call is received is never seen.
//
// Before Linux 6.11 a task uses the filter until its parent has reaped it, so that io.EOF waits for that.
// Before Linux 6.17 a signal can make a caller repeat a call that has been answered: the same bind may come twice.
func (l *Listener) Recv() (*Call, error) {
	if l.err != nil {
		return nil, l.err
	}
	var n sys.SeccompNotif
	l.recv.Lock()
	err := sys.SeccompReceive(l.file, &n)
	l.recv.Unlock()
	if l.closed.Load() {
		// If a call was received all the same, closing the descriptor has answered it.
		return nil, os.ErrClosed
	}
	if err != nil {
		return nil, err
	}
	return l.decode(&n), nil
}

// Close ends a waiting Recv. Calls without an answer, and all later ones, fail with ENOSYS in their program
// once no other process holds the descriptor.
func (l *Listener) Close() error {
	if l.closed.Swap(true) {
		return os.ErrClosed
	}
	if l.err != nil {
		return nil
	}
	if err := l.file.Close(); err != nil {
		return fmt.Errorf("seccomp listener: %w", err)
	}
	return nil
}
