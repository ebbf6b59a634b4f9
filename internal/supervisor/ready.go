//go:build linux

package supervisor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/berth-net/berth/internal/keeper"
	"github.com/berth-net/berth/internal/sys"
	"github.com/berth-net/berth/sockdiag"
)

// trial finds out whether a candidate is ready, by requests that it alone gets.
type trial struct {
	ready      Readiness
	timeout    time.Duration
	generation int
	keeper     *keeper.Client
	diag       *sockdiag.Conn
	env        []string // for exec
	dir        string

	listening <-chan []keeper.Listener // the candidate's listeners, each time that they change
	notified  <-chan struct{}          // READY=1
	forms     []keeper.Form            // which it must listen on
	ports     []uint16                 // on which it must listen, in any form
	others    []keeper.Form            // of all listeners but its own
}

// Pauses between two attempts at a candidate that is not ready yet.
const (
	firstPause = time.Millisecond
	mostPause  = 50 * time.Millisecond
)

// run returns nil once the candidate is ready, or what it still lacks when the time is up.
func (t *trial) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	if t.ready.Kind == "notify" {
		select {
		case <-t.notified:
		case <-ctx.Done():
			return t.late("it did not send READY=1 to NOTIFY_SOCKET")
		}
	}
	var listeners []keeper.Listener
	for t.missing(listeners) != "" {
		if t.ready.Kind == "notify" && listeners != nil {
			// It said that it is ready, so it listens on all that it is going to.
			return errors.New("it sent READY=1 but " + t.missing(listeners))
		}
		select {
		case listeners = <-t.listening:
		case <-ctx.Done():
			return t.late(t.missing(listeners))
		}
	}
	last := ""
	for pause := firstPause; ; pause = min(2*pause, mostPause) {
		select {
		case listeners = <-t.listening:
		default:
		}
		err := t.attempt(ctx, listeners)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == "" {
			last = err.Error()
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return t.late(last)
		}
	}
}

func (t *trial) late(what string) error {
	if what == "" {
		what = "it did not answer"
	}
	return fmt.Errorf("not ready within %s: %s", t.timeout, what)
}

// missing is what the candidate does not listen on yet, in a sentence.
func (t *trial) missing(listeners []keeper.Listener) string {
	for _, form := range t.forms {
		if !slices.ContainsFunc(listeners, func(l keeper.Listener) bool { return l.Form == form }) {
			return fmt.Sprintf("it does not listen on %s", form)
		}
	}
	for _, port := range t.ports {
		if !slices.ContainsFunc(listeners, func(l keeper.Listener) bool { return l.Form.Addr.Port() == port }) {
			return fmt.Sprintf("it does not listen on port %d", port)
		}
	}
	if len(listeners) == 0 && (t.ready.Kind == "tcp" || t.ready.Kind == "http") {
		return "it does not listen on any TCP port"
	}
	return ""
}

func (t *trial) attempt(ctx context.Context, listeners []keeper.Listener) error {
	switch t.ready.Kind {
	case "notify":
		return nil
	case "http":
		return t.http(ctx, listeners)
	case "exec":
		return t.exec(ctx, listeners)
	}
	seen := map[keeper.Form]bool{}
	for _, l := range listeners {
		if seen[l.Form] {
			continue // several that share an address are one to a client
		}
		seen[l.Form] = true
		if err := t.accepted(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

// dial connects to one listener of the candidate's, whatever the public gets. The returned function ends that.
func (t *trial) dial(ctx context.Context, l keeper.Listener) (net.Conn, func(), error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(t.timeout)
	}
	end := func() { _ = t.keeper.Probe(keeper.Probe{Listener: l.ID}) }
	to := l.Form.Reach(t.others...)
	conn, err := sys.DialFrom(to, min(time.Until(deadline), time.Second), func(from netip.AddrPort) error {
		return t.keeper.Probe(keeper.Probe{Listener: l.ID, From: from})
	})
	if err != nil {
		end()
		return nil, nil, fmt.Errorf("connect to %s: %w", to, err)
	}
	_ = conn.SetDeadline(deadline)
	return conn, end, nil
}

// accepted waits until the program, not merely the kernel, has accepted a connection: only then has the connection's socket a file.
func (t *trial) accepted(ctx context.Context, l keeper.Listener) error {
	if l.Form.Device != 0 {
		return nil // out of this machine's own reach: that it listens is all that can be known
	}
	conn, end, err := t.dial(ctx, l)
	if err != nil {
		return err
	}
	defer end()
	defer conn.Close()
	id := sockdiag.ID{Local: addrPort(conn.RemoteAddr()), Remote: addrPort(conn.LocalAddr())}
	for pause := firstPause; ; pause = min(2*pause, mostPause) {
		s, err := t.diag.Get(id)
		gone := errors.Is(err, sockdiag.ErrNotFound)
		if err != nil && !gone {
			return err
		}
		if s.Inode != 0 {
			return nil
		}
		if gone || s.State != sockdiag.Established && s.State != sockdiag.SynReceived {
			// Closed already: with a FIN by a program that accepted it, with a reset if nobody did.
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("a connection to %s was reset before it was accepted", l.Form)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("it listens on %s but accepts no connection", l.Form)
		}
	}
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// http asks for the URL and wants a status of 200 to 399.
func (t *trial) http(ctx context.Context, listeners []keeper.Listener) error {
	u, err := url.Parse(t.ready.URL)
	if err != nil {
		return err
	}
	port, _ := strconv.Atoi(u.Port())
	i := slices.IndexFunc(listeners, func(l keeper.Listener) bool {
		return port == 0 || int(l.Form.Addr.Port()) == port
	})
	if i < 0 {
		return fmt.Errorf("it does not listen on port %d", port)
	}
	conn, end, err := t.dial(ctx, listeners[i])
	if err != nil {
		return err
	}
	defer end()
	defer conn.Close()
	// A candidate that hangs on one request gets another after a while.
	_ = conn.SetDeadline(time.Now().Add(min(t.timeout, 5*time.Second)))
	if u.Hostname() == "" {
		u.Host = listeners[i].Form.Reach().String()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "berth")
	req.Close = true
	if err := req.Write(conn); err != nil {
		return fmt.Errorf("GET %s: %w", u, err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		return fmt.Errorf("GET %s: %w", u, err)
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<20))
	if resp.StatusCode < 200 || resp.StatusCode > 399 {
		return fmt.Errorf("GET %s: %s", u, resp.Status)
	}
	return nil
}

// exec runs the user's check. It reaches the candidate, and nobody else, at BERTH_READY_ADDR.
func (t *trial) exec(ctx context.Context, listeners []keeper.Listener) error {
	cmd := exec.CommandContext(ctx, t.ready.Command[0], t.ready.Command[1:]...)
	cmd.Dir = t.dir
	cmd.Env = append(os.Environ(), t.env...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second
	for i, l := range listeners {
		addr, stop, err := t.forward(ctx, l)
		if err != nil {
			return err
		}
		defer stop()
		cmd.Env = append(cmd.Env, fmt.Sprintf("BERTH_READY_ADDR_%d=%s", l.Form.Addr.Port(), addr))
		if i == 0 {
			host, port, _ := net.SplitHostPort(addr)
			cmd.Env = append(cmd.Env, "BERTH_READY_ADDR="+addr, "BERTH_READY_HOST="+host, "BERTH_READY_PORT="+port)
		}
	}
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(out.String())
		if len(text) > 200 {
			text = text[:200] + "…"
		}
		return fmt.Errorf("%s: %w: %s", t.ready, err, text)
	}
	return nil
}

// forward gives the candidate's listener an address of its own while a check runs.
func (t *trial) forward(ctx context.Context, to keeper.Listener) (addr string, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			// One after the other: a group has one probe at a time, and connecting to this machine takes no time.
			server, end, err := t.dial(ctx, to)
			if err != nil {
				client.Close()
				continue
			}
			end()
			go func() {
				defer client.Close()
				defer server.Close()
				_, _ = io.Copy(client, server)
			}()
			go func() {
				_, _ = io.Copy(server, client)
				if tcp, ok := server.(*net.TCPConn); ok {
					_ = tcp.CloseWrite()
				}
			}()
		}
	}()
	return l.Addr().String(), func() { l.Close() }, nil
}
