// Package load puts HTTP/1.1 load on a server and counts every failure by its kind.
//
// It is for asking whether a deployment, a restart or a crash cost a client anything. So it is exact before it is
// fast: a request is tried once, nothing is retried in silence, each failure is counted as one [Kind], and what isn't
// a failure (a server that closes a connection on which nothing is in flight) is counted apart.
//
// Four sorts of client can be mixed in one run: one-request clients, which connect, ask once and close; kept-alive
// clients, which pause between requests and watch for the server's close while they do; pipelined clients, which have
// several requests in flight on one connection; and slow readers.
//
// It stops at GET over plain HTTP, to one address. A client sends its next request only when the last one is done, so
// a server that stalls is asked less often and the percentiles flatter it; the longest wait doesn't. It runs on
// Linux; elsewhere it builds, and [Generator.Run] returns an error that is errors.ErrUnsupported.
package load

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// Defaults of a [Config].
const (
	DefaultDuration = 10 * time.Second
	DefaultTimeout  = 10 * time.Second
	DefaultDepth    = 8
	DefaultSlowRate = 1024
	DefaultBackoff  = 5 * time.Millisecond
)

// maxBatch bounds, in bytes, what a pipelined client writes before it reads. Any more might not fit in the socket
// buffers of a server that stops reading until its answers are read, and the client would report a time-out of its
// own making.
const maxBatch = 32 << 10

// Config says what to send, and where to. A URL and one client are all it needs.
type Config struct {
	// URL is what to ask for. Without a scheme it is http; ":8080" and "8080" mean localhost.
	URL string

	// OneRequest clients connect, send one request, read the whole response and close.
	OneRequest int

	// KeepAlive clients send one request after the other on one connection, with a Pause in between.
	KeepAlive int

	// Pipelined clients send Depth requests at once on a kept-alive connection, read Depth responses, and Pause.
	Pipelined int

	// SlowReaders connect, send one request, and read the response at SlowRate bytes a second.
	SlowReaders int

	// Pause is how long kept-alive and pipelined clients wait between a response and the next request. They start
	// spread over one pause.
	Pause time.Duration

	// PauseBetween is how long one-request clients and slow readers wait between a response and the next connection.
	PauseBetween time.Duration

	// Depth is the number of requests that a pipelined client has in flight; 0 means DefaultDepth.
	Depth int

	// SlowRate is in bytes a second; 0 means DefaultSlowRate.
	SlowRate int

	// Duration ends the run: no request is sent after it. 0 means no limit when Requests is set, else DefaultDuration.
	Duration time.Duration

	// Requests ends the run after as many; 0 means no limit.
	Requests int64

	// Timeout bounds each request, from connecting to the last byte of the response; a slow reader's bounds the wait
	// for the next byte. 0 means DefaultTimeout.
	Timeout time.Duration

	// Backoff is how long a client waits after it could not connect, so that a server that isn't there costs neither
	// a busy loop nor a million counted refusals. 0 means DefaultBackoff; negative means none.
	Backoff time.Duration

	// Expect is a text that each response's body must hold; empty accepts any body.
	Expect string

	// Header is sent with each request. A Host in it replaces the URL's.
	Header http.Header

	// NoSpread makes all connections come from the address that the kernel chooses. Otherwise, those to 127.0.0.0/8
	// come from many addresses of it, so that ephemeral ports don't run out.
	NoSpread bool
}

// A Generator is one run of load. Its methods may be called from any goroutine.
type Generator struct {
	config   Config
	url      *url.URL
	request  []byte // one request, as it is sent
	batch    []byte // Depth requests
	expect   []byte
	clients  []*client
	target   netip.AddrPort
	spread   *spread
	ran      atomic.Bool
	start    time.Time     // set before the first client starts
	started  chan struct{} // closed when start is set
	stopping atomic.Bool   // no further request
	stopped  chan struct{} // closed after stopping is set
	aborted  atomic.Bool   // what is in flight is given up too
	aborting chan struct{} // closed after aborted is set
	grace    *time.Timer   // aborts the run if what is in flight at its end doesn't end; guarded by stopOnce, then by Run

	stopOnce, abortOnce sync.Once

	claimed atomic.Int64 // requests that a client has taken upon itself
	counts  counts

	// last guards what the previous Snapshot saw, and nothing that clients touch.
	last struct {
		sync.Mutex
		requests int64
		at       time.Duration
	}
}

// New checks the configuration and returns a generator that is ready to run. It sends nothing.
func New(c Config) (*Generator, error) {
	u, err := parseURL(c.URL)
	if err != nil {
		return nil, err
	}
	for _, n := range []struct {
		name  string
		value int64
	}{
		{"one-request clients", int64(c.OneRequest)}, {"kept-alive clients", int64(c.KeepAlive)},
		{"pipelined clients", int64(c.Pipelined)}, {"slow readers", int64(c.SlowReaders)},
		{"the pause", int64(c.Pause)}, {"the pause between connections", int64(c.PauseBetween)},
		{"the depth", int64(c.Depth)}, {"the slow rate", int64(c.SlowRate)},
		{"the duration", int64(c.Duration)}, {"the number of requests", c.Requests}, {"the timeout", int64(c.Timeout)},
	} {
		if n.value < 0 {
			return nil, fmt.Errorf("%s can't be negative", n.name)
		}
	}
	if c.OneRequest+c.KeepAlive+c.Pipelined+c.SlowReaders == 0 {
		return nil, errors.New("no clients: ask for at least one")
	}
	if c.Duration == 0 && c.Requests == 0 {
		c.Duration = DefaultDuration
	}
	setDefault(&c.Timeout, DefaultTimeout)
	setDefault(&c.Depth, DefaultDepth)
	setDefault(&c.SlowRate, DefaultSlowRate)
	setDefault(&c.Backoff, DefaultBackoff)

	g := &Generator{
		config:   c,
		url:      u,
		expect:   []byte(c.Expect),
		started:  make(chan struct{}),
		stopped:  make(chan struct{}),
		aborting: make(chan struct{}),
	}
	if g.request, err = writeRequest(u, c.Header); err != nil {
		return nil, err
	}
	if n := c.Depth * len(g.request); c.Pipelined > 0 && n > maxBatch {
		return nil, fmt.Errorf("a depth of %d is %d bytes of requests in flight, more than the %d that surely fit in the "+
			"socket buffers: ask for at most %d", c.Depth, n, maxBatch, maxBatch/len(g.request))
	}
	g.batch = bytes.Repeat(g.request, c.Depth)
	g.counts.init(c.Timeout)
	for _, s := range []struct {
		role role
		n    int
	}{{oneRequest, c.OneRequest}, {keptAlive, c.KeepAlive}, {pipelined, c.Pipelined}, {slowReader, c.SlowReaders}} {
		for i := range s.n {
			g.clients = append(g.clients, newClient(g, s.role, i, s.n))
		}
	}
	return g, nil
}

func setDefault[T int | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Run sends the load and reports when it is over: after the configured duration or number of requests, after
// [Generator.Stop], or when ctx is cancelled. At its end, requests in flight are waited for, up to the timeout; a
// cancelled ctx gives them up at once, and they are reported as unfinished, not as failed. It can run once.
func (g *Generator) Run(ctx context.Context) (*Report, error) {
	if g.ran.Swap(true) {
		return nil, errors.New("this generator has run already: make a new one")
	}
	if runtime.GOOS != "linux" {
		return nil, fmt.Errorf("load can't be made on %s, only on linux: %w", runtime.GOOS, errors.ErrUnsupported)
	}
	target, err := resolve(ctx, g.url)
	if err != nil {
		return nil, err
	}
	g.target = target
	if !g.config.NoSpread {
		if g.spread, err = newSpread(target.Addr()); err != nil {
			return nil, err
		}
	}
	g.start = time.Now()
	close(g.started)
	if g.config.Duration > 0 {
		defer time.AfterFunc(g.config.Duration, g.Stop).Stop()
	}
	defer context.AfterFunc(ctx, g.abort)()

	var running sync.WaitGroup
	for _, c := range g.clients {
		running.Go(c.run)
	}
	running.Wait()
	elapsed := time.Since(g.start)
	g.Stop() // from here on, no grace timer is started
	if g.grace != nil {
		g.grace.Stop()
	}
	return g.report(elapsed), nil
}

// Stop ends the run early, as the end of its duration would: no further request is sent, and those in flight are
// waited for.
func (g *Generator) Stop() {
	g.stopOnce.Do(func() {
		// A request has its own deadline, which ends it before this does. Only a slow reader that still
		// receives something has none.
		g.grace = time.AfterFunc(g.config.Timeout+time.Second, g.abort)
		g.stopping.Store(true)
		close(g.stopped)
		for _, c := range g.clients {
			c.wake()
		}
	})
}

func (g *Generator) abort() {
	g.Stop()
	g.abortOnce.Do(func() {
		g.aborted.Store(true)
		close(g.aborting)
		for _, c := range g.clients {
			c.expire()
		}
	})
}

// claim takes up to want requests of those that are left to send; 0 means that the run is over.
func (g *Generator) claim(want int) int {
	if g.stopping.Load() {
		return 0
	}
	limit := g.config.Requests
	if limit == 0 {
		return want
	}
	for {
		taken := g.claimed.Load()
		n := min(int64(want), limit-taken)
		if n <= 0 {
			return 0
		}
		if g.claimed.CompareAndSwap(taken, taken+n) {
			return int(n)
		}
	}
}

// A Snapshot is the state of a run at one moment.
type Snapshot struct {
	// Elapsed is the time since the run began; 0 before it has.
	Elapsed time.Duration

	// Requests have ended, well or badly; Failed of them badly.
	Requests, Failed int64

	// InFlight requests wait for their response. A pipelined client's count as one.
	InFlight int

	// ClosedIdle is the number of connections that the server closed with nothing in flight.
	ClosedIdle int64

	// Rate is in requests a second, since the previous Snapshot.
	Rate float64

	// LongestWait is the longest that a request took of those that ended since the previous Snapshot, or has waited so
	// far if it is still in flight. Slow readers are left out.
	LongestWait time.Duration
}

// Snapshot says how the run goes. It is cheap: some thousand a second disturb nothing.
func (g *Generator) Snapshot() Snapshot {
	select {
	case <-g.started:
	default:
		return Snapshot{}
	}
	g.last.Lock()
	defer g.last.Unlock()
	s := Snapshot{
		Elapsed:     time.Since(g.start),
		Requests:    g.counts.requests.Load(),
		Failed:      g.counts.failed.Load(),
		ClosedIdle:  g.counts.closedIdle.n.Load(),
		LongestWait: time.Duration(g.counts.longestLately.Swap(0)),
	}
	for _, c := range g.clients {
		if began := c.began.Load(); began != 0 {
			s.InFlight++
			if c.role != slowReader {
				s.LongestWait = max(s.LongestWait, s.Elapsed-time.Duration(began))
			}
		}
	}
	if d := s.Elapsed - g.last.at; d > 0 {
		s.Rate = float64(s.Requests-g.last.requests) / d.Seconds()
	}
	g.last.requests, g.last.at = s.Requests, s.Elapsed
	return s
}
