package intercept

import (
	"errors"
	"fmt"
	"os"

	"github.com/berth-net/berth/internal/sys"
)

// ErrEpoll means that the old socket is registered in an epoll and that this cannot be carried over to the new one.
var ErrEpoll = errors.New("cannot carry over the socket's epoll registrations")

// Replace puts sock at the caller's descriptor in place of the socket there, with the O_NONBLOCK and FD_CLOEXEC of the old one, and moves the
// epoll registrations of the old one to it. The caller still waits afterwards. If Replace can see beforehand that it cannot do all of
// that ([ErrNotPermitted], [ErrEpoll]), it changes nothing.
//
// Other descriptors of the old socket, made by dup or fork before this call, keep it, and are not followed. Nor are poll requests
// in an io_uring, an epoll that is open only in another process, or the owner set by F_SETOWN.
func (c *Call) Replace(sock *os.File) error {
	flags, err := c.Flags()
	if err != nil {
		return err
	}
	moves, err := c.epollMoves()
	if err != nil {
		return err
	}
	defer moves.close()
	if err := sys.SetNonblock(sock, flags.Nonblock); err != nil {
		return err
	}
	if err := answer(sys.SeccompPlace(c.listener.file, c.ID, sock, c.FD, flags.Cloexec)); err != nil {
		return err
	}
	return moves.run(sock)
}

// epollMoves are the registrations that a socket is to take over, and the duplicates needed for it.
type epollMoves struct {
	fd            int
	old           *os.File
	epolls        []*os.File
	registrations []registration // one for each of epolls
}

// epollMoves looks up in which epolls of the caller the old socket is.
func (c *Call) epollMoves() (*epollMoves, error) {
	found, err := c.registrations()
	if err != nil || len(found) == 0 {
		return &epollMoves{}, err
	}
	m := &epollMoves{fd: c.FD}
	pidfd, err := c.pidfd()
	if err == nil {
		defer pidfd.Close()
		m.old, err = c.duplicate(pidfd, c.FD)
	}
	for _, r := range found {
		if err != nil {
			break
		}
		var epoll *os.File
		if epoll, err = c.duplicate(pidfd, r.epoll); err == nil {
			m.epolls, m.registrations = append(m.epolls, epoll), append(m.registrations, r)
		}
	}
	if err != nil {
		m.close()
		return nil, fmt.Errorf("%w: %w", ErrEpoll, err)
	}
	return m, nil
}

// run moves them to sock.
func (m *epollMoves) run(sock *os.File) error {
	var errs []error
	for i, r := range m.registrations {
		if err := sys.EpollMove(m.epolls[i], m.old, sock, m.fd, r.events, r.data); err != nil {
			errs = append(errs, fmt.Errorf("%w: %w", ErrEpoll, err))
		}
	}
	return errors.Join(errs...)
}

func (m *epollMoves) close() {
	if m.old != nil {
		m.old.Close()
	}
	for _, f := range m.epolls {
		f.Close()
	}
}
