package sockdiag

import (
	"errors"
	"fmt"
	"iter"
	"sync"
	"syscall"

	"github.com/mdlayher/netlink"
)

// maxIdle is how many netlink sockets a Conn keeps for later queries.
const maxIdle = 4

// A Conn answers queries. It keeps its netlink sockets open from one query to the next, and is safe for concurrent use,
// also for a query inside the loop over another one's answer.
type Conn struct {
	mu     sync.Mutex // guards what follows, not the sockets in use
	idle   []*netlink.Conn
	closed bool
}

// Open makes a Conn for the calling thread's network namespace.
func Open() (*Conn, error) {
	nl, err := dial()
	if err != nil {
		return nil, err
	}
	return &Conn{idle: []*netlink.Conn{nl}}, nil
}

func dial() (*netlink.Conn, error) {
	// The kernel fills at most 32 KB of a dump at once.
	nl, err := netlink.Dial(syscall.NETLINK_INET_DIAG, &netlink.Config{MessageBufferSize: 32 << 10})
	if err != nil {
		return nil, fmt.Errorf("sockdiag: can't open a netlink socket: %w", err)
	}
	return nl, nil
}

// Close closes the Conn. A query that is under way ends as it would have.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	for _, nl := range c.idle {
		err = errors.Join(err, nl.Close())
	}
	c.idle, c.closed = nil, true
	return err
}

// take finds an unused netlink socket or makes one.
func (c *Conn) take() (*netlink.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("sockdiag: %w", errClosed)
	}
	if n := len(c.idle); n > 0 {
		nl := c.idle[n-1]
		c.idle = c.idle[:n-1]
		return nl, nil
	}
	return dial()
}

var errClosed = errors.New("use of a closed Conn")

// put gives back a netlink socket. One that still has unread replies must be closed instead.
func (c *Conn) put(nl *netlink.Conn, clean bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !clean || c.closed || len(c.idle) == maxIdle {
		_ = nl.Close()
		return
	}
	c.idle = append(c.idle, nl)
}

// Sockets names the sockets that match, one after the other as the kernel walks its tables. It is no snapshot: a socket
// that changes its state meanwhile may be named twice or not at all. An error ends the sequence.
func (c *Conn) Sockets(f Filter) iter.Seq2[Socket, error] {
	return func(yield func(Socket, error) bool) {
		code, err := f.bytecode()
		if err != nil {
			yield(Socket{}, err)
			return
		}
		message, request := netlink.HeaderType(tcpDiagGetSock), make([]byte, 0, oldRequestLen+attrHeaderLen+len(code))
		if f.Family == 0 {
			request = appendOldRequest(request, f.States.kernel(), f.Info)
		} else {
			message, request = sockDiagByFamily, appendRequest(request, f.Family, f.States.kernel(), f.Info, ID{})
		}
		c.dump(message, appendFilter(request, code), yield)
	}
}

// dump yields what one request finds.
func (c *Conn) dump(message netlink.HeaderType, request []byte, yield func(Socket, error) bool) {
	fail := func(err error) {
		yield(Socket{}, fmt.Errorf("sockdiag: can't list sockets: %w", err))
	}
	nl, err := c.take()
	if err != nil {
		yield(Socket{}, err)
		return
	}
	clean := false
	defer func() { c.put(nl, clean) }()

	sent, err := nl.Send(netlink.Message{
		Header: netlink.Header{Type: message, Flags: netlink.Request | netlink.Dump},
		Data:   request,
	})
	if err != nil {
		fail(err)
		return
	}
	var s Socket
	for m, err := range nl.ReceiveIter() {
		if err != nil {
			fail(err)
			return
		}
		if m.Header.Sequence != sent.Header.Sequence {
			continue
		}
		if err := parse(m.Data, &s); err != nil {
			fail(err)
			return
		}
		if !yield(s, nil) {
			return
		}
	}
	clean = true
}

// Get finds one socket without a walk: the connection of a four-tuple or, if the remote address is zero, a listener.
// If the ID has a cookie, only that socket is meant. The answer has TCP_INFO. No such socket is ErrNotFound.
func (c *Conn) Get(id ID) (Socket, error) {
	family := INET
	if a := id.Local.Addr(); a.Is6() && !a.Is4In6() {
		family = INET6
	}
	var s Socket
	nl, err := c.take()
	if err != nil {
		return s, err
	}
	replies, err := nl.Execute(netlink.Message{
		Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request},
		Data:   appendRequest(make([]byte, 0, requestLen), family, States(0).kernel(), true, id),
	})
	// The kernel's refusal is a reply too: nothing is left unread.
	var op *netlink.OpError
	clean := err == nil || errors.As(err, &op) && (errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ESTALE))
	c.put(nl, clean)
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ESTALE):
		return s, fmt.Errorf("sockdiag: %v to %v: %w", id.Local, id.Remote, ErrNotFound)
	case err != nil:
		return s, fmt.Errorf("sockdiag: can't look up %v to %v: %w", id.Local, id.Remote, err)
	case len(replies) != 1:
		return s, fmt.Errorf("sockdiag: can't look up %v to %v: %w", id.Local, id.Remote, errMalformed)
	}
	if err := parse(replies[0].Data, &s); err != nil {
		return s, fmt.Errorf("sockdiag: can't look up %v to %v: %w", id.Local, id.Remote, err)
	}
	return s, nil
}
