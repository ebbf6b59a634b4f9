package steer

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/berth-net/berth/internal/sys"
)

// Errors of a [Group].
var (
	// ErrNone means that this process cannot steer at all; see [Best] for the reason.
	ErrNone = errors.New("connections cannot be steered here")
	// ErrMPTCP means that the listener is an MPTCP socket: it would be in the group, but no program can choose it.
	ErrMPTCP = errors.New("an MPTCP listener cannot be steered: it must be a plain TCP one")
	// ErrForm means that the socket isn't a TCP listener of the group's form.
	ErrForm = errors.New("the socket is no listener of this group")
	// ErrSteered means that connections go to this listener alone while others are in the group.
	ErrSteered = errors.New("new connections go to this listener alone: steer them elsewhere first")
	// ErrFull means that the group has no free slot.
	ErrFull = fmt.Errorf("the group has %d listeners already", Slots)
	// ErrLeft means that a listener no longer listens, though it was not removed: its program shut it down.
	ErrLeft = errors.New("a listener of the group has stopped listening by itself")
	// ErrSlot means that the slot is not one of the group's.
	ErrSlot = errors.New("no such listener in the group")
)

// Slots is how many listeners a group can hold.
const Slots = 64

// Slot names a listener within its group. After Remove the next Add may use it again.
type Slot int

// Group is the listeners of one form. Its methods may be called by several goroutines.
type Group struct {
	mode Mode

	mu      sync.Mutex // guards what follows and the order of changes to the kernel's group
	engine  engine
	form    form
	members map[Slot]*os.File
	steered []Slot
	probes  map[Slot]netip.AddrPort
}

// engine is a mode's part of a group. Its methods are called under the group's lock.
type engine interface {
	// add takes in a member; the first one of an empty group is steered to.
	add(s Slot, sock *os.File, first bool) error
	// steer and probe return when the kernel follows them.
	steer(slots []Slot) error
	probe(s Slot, from netip.AddrPort) error
	// remove takes out a member that is neither steered to, unless it is the last, nor probed.
	remove(s Slot) error
	strays() (uint64, error)
	close() error
}

// form is what the kernel compares when a listener joins a group (inet_reuseport_add_sock, net/ipv4/inet_hashtables.c).
type form struct {
	family, device int
	v6only         bool
	uid            uint32
	addr           netip.AddrPort
}

// NewGroup makes an empty group. [ErrNone] for mode [None].
func NewGroup(m Mode) (*Group, error) {
	g := &Group{mode: m, members: map[Slot]*os.File{}, probes: map[Slot]netip.AddrPort{}}
	switch m {
	case Extended:
		e, err := newExtended()
		if err != nil {
			return nil, err
		}
		g.engine = e
	case Classic:
		g.engine = &classic{}
	default:
		return nil, ErrNone
	}
	return g, nil
}

// Mode returns how the group is steered.
func (g *Group) Mode() Mode { return g.mode }

// Add takes in a listening socket. The first one of an empty group gets all connections at once; any other gets none before Steer.
//
// sock stays the caller's and must stay open until Remove. In [Classic] mode listeners must be added in the order in which they began to
// listen, and none may begin while Remove runs.
func (g *Group) Add(sock *os.File) (Slot, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f, err := formOf(sock)
	if err != nil {
		return 0, err
	}
	if g.form != (form{}) && g.form != f {
		return 0, fmt.Errorf("%w: %+v, not %+v", ErrForm, f, g.form)
	}
	s, err := g.free()
	if err != nil {
		return 0, err
	}
	first := len(g.members) == 0
	if err := g.engine.add(s, sock, first); err != nil {
		return 0, err
	}
	g.form = f
	g.members[s] = sock
	if first {
		g.steered = []Slot{s}
	}
	return s, nil
}

// formOf checks that a socket is a listener that can be steered.
func formOf(sock *os.File) (form, error) {
	kind, err := sys.KindOf(sock)
	if err != nil {
		return form{}, err
	}
	if kind.Protocol == sys.ProtoMPTCP {
		return form{}, ErrMPTCP
	}
	if !kind.IsStream() || !kind.Listens || !kind.Reuse {
		return form{}, fmt.Errorf("%w: it must be TCP, listen, and have SO_REUSEPORT from before that", ErrForm)
	}
	addr, err := sys.LocalAddr(sock)
	if err != nil {
		return form{}, err
	}
	return form{family: kind.Family, device: kind.Device, v6only: kind.V6Only, uid: kind.UID, addr: addr}, nil
}

func (g *Group) free() (Slot, error) {
	for s := range Slot(Slots) {
		if _, taken := g.members[s]; !taken {
			return s, nil
		}
	}
	return 0, ErrFull
}

// Steer sends new connections to a listener, or spreads them evenly over several. When it returns, the kernel gives a SYN to no other.
// That wait takes some ticks of the kernel's clock (see sys.WaitGracePeriod). [ErrLeft], and nothing has changed, if one of them, or in
// [Classic] mode any listener of the group, has stopped listening by itself.
func (g *Group) Steer(slots ...Slot) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	slots = slices.Compact(slices.Sorted(slices.Values(slots)))
	if len(slots) == 0 {
		return ErrSlot
	}
	for _, s := range slots {
		if g.members[s] == nil {
			return ErrSlot
		}
	}
	return g.steer(slots)
}

func (g *Group) steer(slots []Slot) error {
	if slices.Equal(slots, g.steered) {
		return nil
	}
	if err := g.engine.steer(slots); err != nil {
		return err
	}
	g.steered = slots
	return nil
}

// Probe sends connections from exactly this address and port to a listener, whatever is steered; a zero AddrPort ends it. A listener has one
// prober at a time. IPv4 addresses may come as IPv6 ones and the other way round. A zone isn't compared.
func (g *Group) Probe(s Slot, from netip.AddrPort) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.members[s] == nil {
		return ErrSlot
	}
	return g.probe(s, from)
}

func (g *Group) probe(s Slot, from netip.AddrPort) error {
	if from.Addr().IsValid() {
		from = netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
	} else if from.Port() != 0 {
		return fmt.Errorf("probe from port %d of no address", from.Port())
	}
	if g.probes[s] == from {
		return nil
	}
	for other, at := range g.probes {
		if at == from {
			return fmt.Errorf("probe from %s: that address probes listener %d already", from, other)
		}
	}
	if err := g.engine.probe(s, from); err != nil {
		return err
	}
	if from.Addr().IsValid() {
		g.probes[s] = from
	} else {
		delete(g.probes, s)
	}
	return nil
}

// Remove takes out a listener, just before the caller closes the last descriptor of it. If connections are spread over it and others,
// the others get its share. If they go to it alone while the group has others, Remove refuses with [ErrSteered], and the listener must not be closed.
//
// In [Extended] mode what waits on it, handshakes under way included, migrates when it is closed. In [Classic] mode it is cut by Remove: the kernel
// moves its last listener into the gap, so the group must know the moment, and ends the listening itself, whoever else has the socket.
// Where the steered listener would be the one to move among three or more, it keeps the socket in the kernel's group, with a descriptor
// of its own, until a later change of the group lets it go without a misguided connection; Close does too.
func (g *Group) Remove(s Slot) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.members[s] == nil {
		return ErrSlot
	}
	last := len(g.members) == 1
	if slices.Contains(g.steered, s) && !last {
		rest := slices.DeleteFunc(slices.Clone(g.steered), func(t Slot) bool { return t == s })
		if len(rest) == 0 {
			return ErrSteered
		}
		if err := g.steer(rest); err != nil {
			return err
		}
	}
	if err := g.probe(s, netip.AddrPort{}); err != nil {
		return err
	}
	if err := g.engine.remove(s); err != nil {
		return err
	}
	delete(g.members, s)
	if last {
		g.steered = nil
	}
	return nil
}

// Strays returns how many connections the kernel spread over all listeners of the group, because the one chosen was no listener any more:
// its program had shut it down, for example. Only [Extended] counts them.
func (g *Group) Strays() (uint64, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.engine.strays()
}

// Close gives back what the group holds. Listeners that are still open stay steered as they are.
func (g *Group) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.members)
	return g.engine.close()
}
