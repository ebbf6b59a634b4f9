package drain

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/berth-net/berth/internal/sys"
	"github.com/berth-net/berth/sockdiag"
)

const (
	// sweepEvery is how often the kernel is asked which connections there are.
	sweepEvery = 5 * time.Millisecond
	// A poll or sweep that takes long is made less often: at most a third and a tenth of one CPU's time.
	pollShare, sweepShare = 2, 9
	// dumpFrom is the number of connections from which one dump of all counters is cheaper than asking for each.
	dumpFrom = 64
	// maxStall is how long one connection that its program does not close keeps the others from being ended.
	maxStall = 50 * time.Millisecond
	// handshakes is how long a handshake that was under way at the start may take: a lost ACK of the client's costs one second, a second one two more.
	handshakes = 3500 * time.Millisecond
)

// A Config says what to drain, and how.
type Config struct {
	// Ports are the addresses on which the generation accepts. An unspecified address stands for all local ones, :: also for IPv4.
	Ports []netip.AddrPort
	// Pids tells the generation's processes as they are now.
	Pids func() ([]int, error)
	// Duplicate duplicates a process's descriptor, as pidfd_getfd(2) does. Nil where that's not permitted: idle connections are left alone then.
	Duplicate func(pid, fd int) (*os.File, error)
	// Order knows what came last on a connection. Nil to go by counters.
	Order *Order
	// Quiet is how long nothing may have moved after a response before the connection counts as idle. The default is 2 ms.
	Quiet time.Duration
	// KeepIdle leaves kept-alive connections alone.
	KeepIdle bool
	// Queues tells how many connections wait in the generation's accept queues. Nil if there are none.
	Queues func() (waiting int, err error)
	// Log is told of each connection that is ended, at debug level. Nil for no log.
	Log *slog.Logger
}

// A Progress says how far a drain is.
type Progress struct {
	Connections int // seen so far
	Closed      int // ended by themselves: by the client, or by the program unasked
	Ended       int // ended politely
	Met         int // of those ended, the ones that met a request, though it may have been answered; only an Order can tell
	Asked       int // the program has been made to read an end of file and hasn't closed yet
	Idle        int // nothing in flight, but not ended (yet)
	InFlight    int // a request is in flight, or nobody can tell
	Waiting     int // in an accept queue
	Handshakes  int // begun before the drain, and not complete
}

// Left is the number of connections that are still there.
func (p Progress) Left() int { return p.Asked + p.Idle + p.InFlight + p.Waiting + p.Handshakes }

// A Result says what a drain did. What its Progress counts as left was there when the deadline came.
type Result struct {
	Progress
	Elapsed time.Duration
	Longest time.Duration // the longest that a connection was waited for because something was in flight on it
	Polls   int           // how often connections were looked at
	Busy    time.Duration // the time that looking took, of Elapsed
	Refused error         // why connections couldn't be duplicated, if that ended the attempts
}

// A Drainer drains one generation, once.
type Drainer struct {
	config      Config
	ports       []uint16
	diag        *sockdiag.Conn
	generation  generation
	connections map[uint64]*connection // by cookie
	foreign     map[uint64]stranger    // connections on the ports that others have, by cookie
	halfOpen    map[uint64]bool        // handshakes that were under way at the start, by cookie

	sweeps   int
	walkDue  bool // a connection's holder is out of date
	rhythm   time.Duration
	started  time.Duration
	askedAt  time.Duration // when the last connection was ended
	ending   *connection   // the last one that was asked to end
	calm     int           // how many sweeps in a row nothing was in a queue or half open
	settled  int           // how many sweeps in a row have found nothing to wait for
	result   Result
	mu       sync.Mutex // guards progress only
	progress Progress
}

// A stranger is a connection of another generation, or one that isn't accepted yet.
type stranger struct{ seenIn, walks int }

// New prepares a drain. It changes nothing yet.
func New(config Config) (*Drainer, error) {
	if len(config.Ports) == 0 || config.Pids == nil {
		return nil, errors.New("can't drain without ports and processes")
	}
	config.Quiet = cmp.Or(config.Quiet, DefaultQuiet)
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	d := &Drainer{
		config:      config,
		generation:  generation{pids: config.Pids, holders: map[uint32]holder{}},
		connections: map[uint64]*connection{},
		foreign:     map[uint64]stranger{},
	}
	for _, p := range config.Ports {
		d.ports = append(d.ports, p.Port())
	}
	return d, nil
}

// Progress tells how far Run is. It may be called at any time.
func (d *Drainer) Progress() Progress {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.progress
}

// Run drains until nothing is in flight and no connection is left that it may end, or until ctx ends, which is no error:
// the result says what is left then. An error means that it couldn't see the generation's connections.
func (d *Drainer) Run(ctx context.Context) (Result, error) {
	diag, err := sockdiag.Open()
	if err != nil {
		return Result{}, err
	}
	defer diag.Close()
	d.diag = diag
	d.started = sys.Monotonic()

	var sweepAt, sweepTook, pollTook time.Duration
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		now := sys.Monotonic()
		// The kernel's walk may take a CPU for milliseconds, which a program that is about to close needs more.
		if now >= sweepAt && (now >= d.askedAt+sweepEvery || now >= sweepAt+10*sweepEvery) {
			if err := d.sweep(now); err != nil {
				return d.finish(), fmt.Errorf("can't drain: %w", err)
			}
			sweepTook = sys.Monotonic() - now
			sweepAt = now + sweepTook + max(sweepEvery, sweepShare*sweepTook)
		}
		start := sys.Monotonic()
		next, err := d.poll(start, start+max(pollEvery, pollShare*pollTook))
		if err != nil {
			return d.finish(), fmt.Errorf("can't drain: %w", err)
		}
		end := sys.Monotonic()
		pollTook = end - start
		d.result.Busy += end - now
		d.publish()
		if d.waitsForNothing() {
			sweepAt = min(sweepAt, end+max(pollEvery, sweepTook)) // to make sure
		}
		if d.settled >= 2 || ctx.Err() != nil {
			return d.finish(), nil
		}
		timer.Reset(max(min(next, max(sweepAt, d.askedAt+sweepEvery))-end, pollEvery/10))
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
	}
}

// finish completes the result.
func (d *Drainer) finish() Result {
	d.publish()
	d.result.Elapsed = sys.Monotonic() - d.started
	d.result.Progress = d.Progress()
	return d.result
}

// publish brings the progress up to date.
func (d *Drainer) publish() {
	p := d.result.Progress
	for _, c := range d.connections {
		switch {
		case c.asked:
			p.Asked++
		case c.idle:
			p.Idle++
		default:
			p.InFlight++
		}
	}
	p.Handshakes = len(d.halfOpen)
	d.mu.Lock()
	d.progress = p
	d.mu.Unlock()
}

// sweep asks the kernel which connections there are, and finds out whose they are.
func (d *Drainer) sweep(now time.Duration) error {
	d.result.Waiting = 0
	if d.config.Queues != nil {
		waiting, err := d.config.Queues() // before the connections: one that leaves a queue now is found among them
		if err != nil {
			return fmt.Errorf("can't tell the accept queues' lengths: %w", err)
		}
		d.result.Waiting = waiting
	}
	first := d.sweeps == 0
	d.sweeps++
	if first || d.walkDue {
		if err := d.generation.walk(); err != nil {
			return err
		}
		d.walkDue = false
		for _, c := range d.connections {
			c.holder = d.generation.holders[c.inode]
		}
	}
	found := map[uint64]bool{}
	var unknown []sockdiag.Socket
	err := d.dump(func(s *sockdiag.Socket) {
		switch {
		case s.State == sockdiag.SynReceived:
			found[s.Cookie] = true
		case s.Inode == 0: // it waits in an accept queue, or no process has it any more
		case d.connections[s.Cookie] != nil:
			d.see(now, d.connections[s.Cookie], s)
		case !d.adopt(now, s):
			unknown = append(unknown, *s)
		}
	})
	if err != nil {
		return err
	}
	if err := d.sortOut(now, unknown); err != nil {
		return err
	}
	if first {
		d.halfOpen = found
	}
	for cookie := range d.halfOpen {
		if !found[cookie] || now-d.started > handshakes {
			delete(d.halfOpen, cookie)
		}
	}
	d.reckon(now)
	return nil
}

// dump calls f with the connections on the generation's ports.
func (d *Drainer) dump(f func(*sockdiag.Socket)) error {
	filter := sockdiag.Filter{
		States: sockdiag.In(sockdiag.Established, sockdiag.SynReceived, sockdiag.FinWait1, sockdiag.FinWait2,
			sockdiag.CloseWait, sockdiag.Closing),
		LocalPorts: d.ports,
		Info:       true,
	}
	for s, err := range d.diag.Sockets(filter) {
		if err != nil {
			return err
		}
		if d.concerns(s.Local) {
			f(&s)
		}
	}
	return nil
}

// concerns reports whether a local address is one of the ports'.
func (d *Drainer) concerns(local netip.AddrPort) bool {
	for _, p := range d.config.Ports {
		if p.Port() != local.Port() {
			continue
		}
		a := p.Addr().Unmap().WithZone("")
		if a == local.Addr() || a == netip.IPv6Unspecified() || a == netip.IPv4Unspecified() && local.Addr().Is4() {
			return true
		}
	}
	return false
}

// adopt starts to watch a connection if one of the generation's processes has it.
func (d *Drainer) adopt(now time.Duration, s *sockdiag.Socket) bool {
	holder, ok := d.generation.holders[s.Inode]
	if !ok {
		return false
	}
	c := &connection{id: s.ID(), inode: s.Inode, holder: holder, firstSeen: now, next: now}
	d.connections[s.Cookie] = c
	delete(d.foreign, s.Cookie)
	d.result.Connections++
	d.see(now, c, s)
	return true
}

// see takes in what a dump or a look tells of a connection.
func (d *Drainer) see(now time.Duration, c *connection, s *sockdiag.Socket) {
	c.state, c.seenIn = s.State, d.sweeps
	if s.HasInfo {
		c.counters.look(now, s)
	}
}

// sortOut tells the generation's new connections from other generations'. A process has a connection a moment after accept gave it its inode, so a
// stranger is looked for twice.
func (d *Drainer) sortOut(now time.Duration, unknown []sockdiag.Socket) error {
	walk := false
	for i := range unknown {
		walk = walk || d.foreign[unknown[i].Cookie].walks < 2
	}
	if walk {
		if err := d.generation.walk(); err != nil {
			return err
		}
	}
	for i := range unknown {
		s := &unknown[i]
		if walk && d.adopt(now, s) {
			continue
		}
		f := d.foreign[s.Cookie]
		f.seenIn = d.sweeps
		if walk {
			f.walks++
		}
		d.foreign[s.Cookie] = f
	}
	for cookie, f := range d.foreign {
		if f.seenIn != d.sweeps {
			delete(d.foreign, cookie)
		}
	}
	return nil
}

// reckon counts the connections that are gone, and finds out whether anything is left to wait for.
func (d *Drainer) reckon(now time.Duration) {
	d.rhythm = 0
	for _, c := range d.connections {
		if c.seenIn != d.sweeps {
			d.gone(now, c)
			continue
		}
		d.rhythm = max(d.rhythm, c.gap())
	}
	if d.calm++; d.result.Waiting > 0 || len(d.halfOpen) > 0 {
		d.calm = 0
	}
	if d.waitsForNothing() {
		d.settled++
	} else {
		d.settled = 0
	}
}

// waitsForNothing reports whether everything known is over, or idle and to be left alone.
func (d *Drainer) waitsForNothing() bool {
	if d.calm == 0 {
		return false
	}
	for _, c := range d.connections {
		if c.asked || !c.idle || d.mayEnd(c) {
			return false
		}
	}
	// Where nothing was on its way to the generation for two sweeps, all that it had accepted has been found, and no stranger can turn out
	// to be its own. Other generations' connections come and go all the time.
	for _, f := range d.foreign {
		if f.walks < 2 && d.calm < 3 {
			return false
		}
	}
	return true
}

// gone counts a connection that has ended.
func (d *Drainer) gone(now time.Duration, c *connection) {
	delete(d.connections, c.id.Cookie)
	if !c.asked {
		d.result.Closed++
		d.result.Longest = max(d.result.Longest, now-c.firstSeen)
		return
	}
	d.result.Ended++
	if d.config.Order == nil {
		return
	}
	if a, ok := d.config.Order.Lookup(c.id.Cookie); ok && a.LastIn > c.askedAt {
		d.result.Met++
	}
}

// mayEnd reports whether the connection is one to end when it's idle.
func (d *Drainer) mayEnd(c *connection) bool {
	return !d.config.KeepIdle && d.config.Duplicate != nil && d.result.Refused == nil && c.state == sockdiag.Established
}

// poll looks at the connections whose time has come, and ends those that are idle. It returns when to look next, not before soon.
func (d *Drainer) poll(now, soon time.Duration) (next time.Duration, err error) {
	d.result.Polls++
	next = now + time.Hour
	var counted []*connection
	for cookie, c := range d.connections {
		if c.next > now {
			next = min(next, max(c.next, soon))
			continue
		}
		if c.ordered = false; d.config.Order != nil && !c.asked {
			var known bool
			c.activity, known = d.config.Order.Lookup(cookie)
			c.ordered = known && c.activity.LastIn > c.mistrust
		}
		if !c.ordered {
			counted = append(counted, c)
			continue
		}
		if err := d.judge(now, c); err != nil {
			return next, err
		}
		next = min(next, max(c.next, soon))
	}
	if err := d.count(now, counted); err != nil {
		return next, err
	}
	for _, c := range counted {
		if d.connections[c.id.Cookie] == nil {
			continue
		}
		if err := d.judge(now, c); err != nil {
			return next, err
		}
		next = min(next, max(c.next, soon))
	}
	return next, nil
}

// count reads the counters of connections: all in one dump if they are many.
func (d *Drainer) count(now time.Duration, all []*connection) error {
	if len(all) < dumpFrom {
		for _, c := range all {
			if err := d.get(now, c); err != nil {
				return err
			}
		}
		return nil
	}
	return d.dump(func(s *sockdiag.Socket) {
		if c := d.connections[s.Cookie]; c != nil && s.Inode != 0 {
			d.see(now, c, s)
		}
	})
}

// get reads the counters of one connection, or finds that it's gone.
func (d *Drainer) get(now time.Duration, c *connection) error {
	s, err := d.diag.Get(c.id)
	switch {
	case errors.Is(err, sockdiag.ErrNotFound), err == nil && s.Inode == 0:
		d.gone(now, c)
	case err != nil:
		return err
	default:
		d.see(now, c, &s)
	}
	return nil
}

// judge decides whether a connection is idle, ends it if so, and says when to look again.
func (d *Drainer) judge(now time.Duration, c *connection) error {
	if c.asked {
		c.next = now + (now-c.askedAt)/4 // its program closes it at once, or late
		return nil
	}
	o := c.outlook(d.config.Quiet, d.rhythm)
	wasIdle := c.idle
	c.idle = o.quiet(now)
	if c.idle && !wasIdle {
		d.result.Longest = max(d.result.Longest, now-c.firstSeen)
	}
	ok, again := o.idle(now)
	c.next = again
	if !ok || !d.mayEnd(c) || !c.ordered && now-d.started < learning && now-o.since < Silence {
		return nil
	}
	if now-o.since < stale && d.busyEnding(now) {
		return nil
	}
	err := d.end(c, o)
	if err == nil {
		d.ending = c
		return nil
	}
	d.config.Log.Debug("connection not ended", "local", c.id.Local, "remote", c.id.Remote, "reason", err)
	if errors.Is(err, errBusy) {
		return nil
	}
	return d.get(now, c) // most likely its program has closed it
}

// busyEnding reports whether the program has not closed yet what it was asked to close last. While it stalls (it is collecting
// garbage, or waits for a CPU), requests arrive on connections whose end of file it has still to read: so only one
// at a time is exposed to that.
func (d *Drainer) busyEnding(now time.Duration) bool {
	return d.ending != nil && d.connections[d.ending.id.Cookie] == d.ending && now-d.ending.askedAt < maxStall
}

// end makes the program read an end of file on the connection if it's still idle. The duplicate lives for that moment only:
// while it's open, the program's own close would send no FIN.
func (d *Drainer) end(c *connection, o outlook) error {
	if c.holder == (holder{}) {
		d.walkDue = true
		return errors.New("no process has it")
	}
	f, err := d.config.Duplicate(c.holder.pid, c.holder.fd)
	if errors.Is(err, os.ErrPermission) {
		d.result.Refused = err
		d.config.Log.Warn("can't end idle connections", "reason", err)
		return err
	}
	if err != nil {
		d.walkDue = true
		return err
	}
	defer f.Close()
	if cookie, err := sys.SocketCookie(f); err != nil || cookie != c.id.Cookie {
		d.walkDue = true
		return errors.New("its descriptor is another file's now")
	}
	t, err := sys.TrafficOf(f)
	if err != nil {
		return err
	}
	if t.State != sys.TCPEstablished || t.Unread != 0 || t.Unsent != 0 {
		return errBusy
	}
	if c.ordered {
		err = d.stillOrdered(c, t)
	} else if i := &c.counters.last; t.BytesReceived != i.BytesReceived || t.BytesSent != i.BytesSent-i.BytesRetrans {
		err = errBusy
	}
	if err != nil {
		return err
	}
	if still, _ := o.idle(sys.Monotonic()); !still {
		return errBusy // this process had to wait for a CPU, and the moment has passed
	}
	if err := sys.ShutdownRead(f); err != nil {
		return err
	}
	c.asked, c.askedAt = true, sys.Monotonic()
	d.askedAt = c.askedAt
	d.config.Log.Debug("connection ended while idle", "local", c.id.Local, "remote", c.id.Remote)
	return nil
}

var errBusy = errors.New("something is in flight")

// stillOrdered compares what the Order knows with its last word, and with what TCP itself says of the last payload in.
func (d *Drainer) stillOrdered(c *connection, t sys.Traffic) error {
	a, ok := d.config.Order.Lookup(c.id.Cookie)
	if !ok || a.LastIn != c.activity.LastIn || a.LastOut != c.activity.LastOut {
		return errBusy
	}
	// Has TCP taken in payload that the Order missed or took for a repetition?
	if sys.Monotonic()-a.LastIn > t.LastDataReceived+tick+2*time.Millisecond {
		c.mistrust = a.LastIn
		return errBusy
	}
	return nil
}
