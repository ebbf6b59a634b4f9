package steer

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/berth-net/berth/internal/sys"
	"golang.org/x/net/bpf"
)

// classic steers with a classic BPF program, made anew for each change, that returns an index in the kernel's order of the group: a listener
// is appended when it begins to listen; when it stops, the last one moves into its place (net/core/sock_reuseport.c: __reuseport_add_sock,
// __reuseport_detach_sock. With net.ipv4.tcp_migrate_req the stopped ones are kept at the other end of the array, where no index leads).
type classic struct {
	order   []member // as the kernel's
	steered []Slot
	probes  []prober
}

// member is a listener in the kernel's group.
type member struct {
	slot Slot // parked: -1
	sock *os.File
}

// parked is the slot of a listener that was removed but may not leave its place yet.
const parked Slot = -1

// prober is a source whose connections go to one listener.
type prober struct {
	slot Slot
	from netip.AddrPort
}

func (c *classic) add(s Slot, sock *os.File, first bool) error {
	c.order = append(c.order, member{s, sock})
	if first {
		c.steered = []Slot{s}
		if err := c.attach(); err != nil {
			c.order = c.order[:len(c.order)-1]
			return err
		}
	}
	// With a listener at the end that nobody is sent to, parked ones can leave.
	return c.unpark()
}

func (c *classic) steer(slots []Slot) error {
	was := c.steered
	c.steered = slots
	if err := c.attach(); err != nil {
		c.steered = was
		return err
	}
	settle()
	return c.unpark()
}

func (c *classic) probe(s Slot, from netip.AddrPort) error {
	was := slices.Clone(c.probes)
	c.probes = slices.DeleteFunc(c.probes, func(p prober) bool { return p.slot == s })
	if from.IsValid() {
		c.probes = append(c.probes, prober{s, from})
	}
	if slices.Equal(was, c.probes) {
		return nil
	}
	if err := c.attach(); err != nil {
		c.probes = was
		return err
	}
	settle()
	return c.unpark()
}

func (c *classic) remove(s Slot) error {
	i := c.index(s)
	if c.mayLeave(i) {
		if err := c.leave(i); err != nil {
			return err
		}
		return c.unpark()
	}
	// The caller closes its descriptor; the listener must stay.
	dup, err := sys.Duplicate(c.order[i].sock)
	if err != nil {
		return err
	}
	c.order[i] = member{parked, dup}
	return sys.CutQueue(dup)
}

// mayLeave reports whether listener i can stop listening while the program stays as it is, and every connection is still guided rightly: before
// and after, and at the moment when the kernel moves the last one into its place.
func (c *classic) mayLeave(i int) bool {
	last := len(c.order) - 1
	// The last one leaves no gap. One that nobody is sent to may move. Of two, the other one is all that is left; an index that is out of
	// bounds means that the kernel chooses, and there is no choice.
	return i == last || len(c.order) == 2 || !c.target(c.order[last].slot)
}

// target reports whether connections are sent to the slot.
func (c *classic) target(s Slot) bool {
	return slices.Contains(c.steered, s) || slices.ContainsFunc(c.probes, func(p prober) bool { return p.slot == s })
}

// leave ends listener i and follows the kernel's order.
func (c *classic) leave(i int) error {
	// Closing a descriptor would do only if there were no other.
	if err := sys.StopListening(c.order[i].sock); err != nil {
		return err
	}
	if c.order[i].slot == parked {
		c.order[i].sock.Close()
	}
	last := len(c.order) - 1
	moved := i != last && c.target(c.order[last].slot)
	c.order[i] = c.order[last]
	c.order = c.order[:last]
	if moved {
		// Before the next listener takes the index that the program still returns.
		return c.attach()
	}
	return nil
}

// unpark lets parked listeners go, as far as that is safe now.
func (c *classic) unpark() error {
	for i := 0; i < len(c.order); i++ {
		if c.order[i].slot == parked && c.mayLeave(i) {
			if err := c.leave(i); err != nil {
				return err
			}
			i = -1 // the order has changed
		}
	}
	return nil
}

func (c *classic) index(s Slot) int {
	return slices.IndexFunc(c.order, func(m member) bool { return m.slot == s })
}

func (c *classic) strays() (uint64, error) { return 0, nil }

func (c *classic) close() error {
	for _, m := range c.order {
		if m.slot == parked {
			_ = sys.StopListening(m.sock)
			m.sock.Close()
		}
	}
	c.order = nil
	return nil
}

// attach puts the present program on the group.
func (c *classic) attach() error {
	for _, m := range c.order {
		// One that has left without us has changed the order; and to it the kernel would attach the program alone (reuseport_attach_prog).
		if kind, err := sys.KindOf(m.sock); err != nil {
			return err
		} else if !kind.Listens {
			return ErrLeft
		}
	}
	program, err := bpf.Assemble(c.program())
	if err != nil {
		return fmt.Errorf("classic BPF program: %w", err)
	}
	return sys.AttachReuseportClassic(c.order[0].sock, program)
}

// Where a classic program finds the network header: its loads count from the end of the TCP header (run_bpf_filter in net/core/sock_reuseport.c),
// and this offset leads to the network header whatever they count from (SKF_NET_OFF, include/uapi/linux/filter.h).
const network = -0x100000 & 0xffffffff

// program compares the source of a SYN with each prober's and else picks one of the steered at random.
func (c *classic) program() []bpf.Instruction {
	var v4, v6 []bpf.Instruction
	for _, p := range c.probes {
		index := c.index(p.slot)
		if ip := p.from.Addr(); ip.Is4() {
			// The TCP header is behind the options, if there are any.
			v4 = append(v4, match(index, []load{
				{bpf.LoadAbsolute{Off: network + 12, Size: 4}, be32(ip.AsSlice())},
				{bpf.LoadIndirect{Off: network, Size: 2}, uint32(p.from.Port())},
			})...)
		} else {
			b := ip.As16()
			v6 = append(v6, match(index, []load{
				{bpf.LoadAbsolute{Off: network + 8, Size: 4}, be32(b[0:])},
				{bpf.LoadAbsolute{Off: network + 12, Size: 4}, be32(b[4:])},
				{bpf.LoadAbsolute{Off: network + 16, Size: 4}, be32(b[8:])},
				{bpf.LoadAbsolute{Off: network + 20, Size: 4}, be32(b[12:])},
				{bpf.LoadAbsolute{Off: network + 40, Size: 2}, uint32(p.from.Port())},
			})...)
		}
	}
	var program []bpf.Instruction
	if len(v4) > 0 {
		v4 = append([]bpf.Instruction{
			bpf.LoadAbsolute{Off: network, Size: 1},
			bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0x0f},
			bpf.ALUOpConstant{Op: bpf.ALUOpShiftLeft, Val: 2},
			bpf.TAX{},
		}, v4...)
		program = append(program, whenVersion(4, v4)...)
	}
	if len(v6) > 0 {
		// An extension header before the TCP header: not a prober's packet.
		v6 = append([]bpf.Instruction{bpf.LoadAbsolute{Off: network + 6, Size: 1}}, when(6, v6)...)
		program = append(program, whenVersion(6, v6)...)
	}
	return append(program, c.pick()...)
}

// pick returns the index of one of the steered.
func (c *classic) pick() []bpf.Instruction {
	var program []bpf.Instruction
	if len(c.steered) > 1 {
		program = append(program, bpf.LoadExtension{Num: bpf.ExtRand}, bpf.ALUOpConstant{Op: bpf.ALUOpMod, Val: uint32(len(c.steered))})
		for i, s := range c.steered[1:] {
			program = append(program,
				bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(i + 1), SkipTrue: 1},
				bpf.RetConstant{Val: uint32(c.index(s))})
		}
	}
	return append(program, bpf.RetConstant{Val: uint32(c.index(c.steered[0]))})
}

// load is an instruction that loads a value, and the value wanted.
type load struct {
	instruction bpf.Instruction
	want        uint32
}

// match returns the index if every load loads what is wanted.
func match(index int, loads []load) []bpf.Instruction {
	program := []bpf.Instruction{bpf.RetConstant{Val: uint32(index)}}
	for _, l := range slices.Backward(loads) {
		program = append([]bpf.Instruction{l.instruction}, when(l.want, program)...)
	}
	return program
}

// whenVersion runs then for packets of that version of IP.
func whenVersion(version uint32, then []bpf.Instruction) []bpf.Instruction {
	return append([]bpf.Instruction{
		bpf.LoadAbsolute{Off: network, Size: 1},
		bpf.ALUOpConstant{Op: bpf.ALUOpShiftRight, Val: 4},
	}, when(version, then)...)
}

// when runs then if the accumulator holds value.
func when(value uint32, then []bpf.Instruction) []bpf.Instruction {
	return append([]bpf.Instruction{
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: value, SkipTrue: 1},
		bpf.Jump{Skip: uint32(len(then))}, // a conditional jump reaches 255 instructions at most
	}, then...)
}

func be32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }
