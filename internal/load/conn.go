package load

import (
	"fmt"
	"math"
	"net/netip"
	"os"
	"time"

	"github.com/berth-net/berth/internal/sys"
)

// maxHeader bounds, in bytes, a response's status line and header.
const maxHeader = 1 << 20

var errHeader = fmt.Errorf("header of more than %d bytes", maxHeader)

// slowBuffer is the receive buffer of slow readers, in bytes: so small that the server, and not the kernel, feels how
// slow they are.
const slowBuffer = 4096

// A conn is a connection that remembers what its response parser would not tell: how much came, and what ended it.
type conn struct {
	*sys.Stream
	counts *counts

	received int64     // bytes
	first    time.Time // of the first byte received, of slow readers
	met      error     // of the last Read
	answered bool      // with at least one whole response
	well     bool      // with a right one, last
	headroom int64     // bytes that may still be read before it is too much

	pace *pace // nil reads as fast as it can
}

// A pace makes reading slow.
type pace struct {
	rate    int           // bytes a second
	timeout time.Duration // of the wait for the next byte
	abort   <-chan struct{}
	due     time.Time // of the next read
}

// startConn begins a connection; FinishConnect makes it usable.
func startConn(c *counts, target netip.AddrPort, o sys.ConnectOptions) (*conn, error) {
	s, err := sys.StartConnect(target, o)
	if err != nil {
		return nil, err
	}
	return &conn{Stream: s, counts: c, headroom: math.MaxInt64}, nil
}

// Read reads what has come, at the connection's pace.
func (c *conn) Read(p []byte) (int, error) {
	if c.headroom <= 0 {
		return 0, errHeader
	}
	if c.pace != nil {
		p = p[:min(len(p), max(1, c.pace.rate/10))]
		if c.met = c.pace.wait(c.Stream); c.met != nil {
			return 0, c.met
		}
	}
	n, err := c.Stream.Read(p)
	c.met = err
	if n > 0 {
		c.received += int64(n)
		c.headroom -= int64(n)
		c.counts.bytes.Add(int64(n))
		if c.pace != nil {
			c.pace.read(n, &c.first)
		}
	}
	return n, err
}

// wait waits until the next read is due.
func (p *pace) wait(s *sys.Stream) error {
	if d := time.Until(p.due); d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-p.abort:
		}
	}
	if err := s.SetReadDeadline(time.Now().Add(p.timeout)); err != nil {
		return err
	}
	// Looked at after the deadline is set, so that an abort's own deadline can't be undone unseen.
	select {
	case <-p.abort:
		return os.ErrDeadlineExceeded
	default:
		return nil
	}
}

// read notes that n bytes came.
func (p *pace) read(n int, first *time.Time) {
	now := time.Now()
	if first.IsZero() {
		*first = now
	}
	p.due = now.Add(time.Duration(n) * time.Second / time.Duration(p.rate))
}

// cut returns what ended the connection while a response was awaited, or nil when nothing has. unsent is the error of
// the request's write, which says more than the end of file that follows it.
func (c *conn) cut(unsent error) error {
	if unsent != nil && (c.met == nil || gone(c.met)) {
		return unsent
	}
	return c.met
}
