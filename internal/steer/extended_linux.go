package steer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"github.com/berth-net/berth/internal/sys"
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// extended steers with an eBPF program and three maps:
//
//   - berth_socks, the listeners by slot. The kernel takes a listener out when it stops listening.
//   - berth_config, an array. Entries 1 and 2 are sets of slots, entry 0 says which of them counts. A change writes the other set first and then
//     entry 0, of which a single byte differs, so that no program sees half of it. It then waits until no program can still be
//     reading the set that counted before, which makes that set free for the next change.
//   - berth_probes, slots by the prober's address and port. An entry that is deleted may be used again by the kernel at once, under the eyes of a
//     program that found it; so the deletion waits as well.
type extended struct {
	socks, config, probes *ebpf.Map
	program               *ebpf.Program
	turn                  uint32 // entry 0 of config
	from                  map[Slot]netip.AddrPort
}

// Entries of berth_config.
const (
	configTurn  = 0
	configSets  = 1 // and 2
	configStray = 3 // how often the chosen slot was empty
	configSize  = 4
)

// configValue is an entry of berth_config.
type configValue struct {
	N     uint32 // configTurn: the index of the set; a set: how many slots it has
	_     uint32 // together a count, in configStray
	Slots [Slots]uint8
}

// probeKey is the source of a connection, IPv4 as v4-mapped.
type probeKey struct {
	Addr [16]byte
	Port [2]byte // big-endian
	_    [6]byte
}

func newExtended() (e *extended, err error) {
	e = &extended{turn: configSets, from: map[Slot]netip.AddrPort{}}
	defer func() {
		if err != nil {
			e.close()
			e = nil
		}
	}()
	// The values of a sockarray are cookies when read, which takes 8 bytes.
	if e.socks, err = ebpf.NewMap(&ebpf.MapSpec{Name: "berth_socks", Type: ebpf.ReusePortSockArray, KeySize: 4, ValueSize: 8, MaxEntries: Slots}); err != nil {
		return e, err
	}
	if e.config, err = ebpf.NewMap(&ebpf.MapSpec{Name: "berth_config", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(binary.Size(configValue{})), MaxEntries: configSize}); err != nil {
		return e, err
	}
	if e.probes, err = ebpf.NewMap(&ebpf.MapSpec{Name: "berth_probes", Type: ebpf.Hash, KeySize: uint32(binary.Size(probeKey{})), ValueSize: 4, MaxEntries: Slots}); err != nil {
		return e, err
	}
	if err = e.config.Put(uint32(configTurn), configValue{N: e.turn}); err != nil {
		return e, err
	}
	e.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "berth_steer",
		Type:         ebpf.SkReuseport,
		AttachType:   ebpf.AttachSkReuseportSelectOrMigrate,
		License:      "Apache-2.0",
		Instructions: e.instructions(),
	})
	return e, err
}

// Offsets in struct sk_reuseport_md, which the program gets (include/uapi/linux/bpf.h).
const (
	mdData          = 0
	mdDataEnd       = 8
	mdEthProtocol   = 20
	mdHash          = 32
	mdMigratingSock = 48
)

// instructions are the program. Where it finds no listener it passes without a choice, and the kernel chooses.
func (e *extended) instructions() asm.Instructions {
	const (
		ctx  = asm.R6
		slot = -4               // on the stack: the chosen slot, or a key of config
		key  = -32              // on the stack: a probeKey
		net  = 1                // BPF_HDR_START_NET
		pass = 1                // SK_PASS
		port = key + 16         // probeKey.Port
		v4   = key + 12         // probeKey.Addr, where an IPv4 address goes
		sets = 8                // configValue.Slots
		mask = int32(Slots) - 1 // for the verifier
		load = asm.FnMapLookupElem
	)
	ethernet := func(proto uint16) int32 { // eth_protocol is big-endian
		return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, proto)))
	}
	return asm.Instructions{
		asm.Mov.Reg(ctx, asm.R1),

		// A connection that migrates may come without a packet, and its prober, if it has one, has been served: it goes where all go.
		asm.LoadMem(asm.R0, ctx, mdMigratingSock, asm.DWord),
		asm.JNE.Imm(asm.R0, 0, "steered"),

		// The probe: make its key from the network header and the TCP header, at which data begins.
		asm.Mov.Imm(asm.R0, 0),
		asm.StoreMem(asm.RFP, key, asm.R0, asm.DWord),
		asm.StoreMem(asm.RFP, key+8, asm.R0, asm.DWord),
		asm.StoreMem(asm.RFP, key+16, asm.R0, asm.DWord),
		asm.LoadMem(asm.R2, ctx, mdData, asm.DWord),
		asm.LoadMem(asm.R3, ctx, mdDataEnd, asm.DWord),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, 2),
		asm.JGT.Reg(asm.R4, asm.R3, "steered"),
		asm.LoadMem(asm.R4, asm.R2, 0, asm.Half),
		asm.StoreMem(asm.RFP, port, asm.R4, asm.Half),
		asm.LoadMem(asm.R0, ctx, mdEthProtocol, asm.Word),
		asm.JEq.Imm(asm.R0, ethernet(syscall.ETH_P_IPV6), "ipv6"),
		asm.JNE.Imm(asm.R0, ethernet(syscall.ETH_P_IP), "steered"),
		asm.StoreImm(asm.RFP, v4-2, 0xffff, asm.Half),
		asm.Mov.Imm(asm.R2, 12), // the source address, in struct iphdr
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, v4),
		asm.Mov.Imm(asm.R4, 4),
		asm.Ja.Label("address"),
		asm.Mov.Imm(asm.R2, 8).WithSymbol("ipv6"), // in struct ipv6hdr
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, key),
		asm.Mov.Imm(asm.R4, 16),
		asm.Mov.Reg(asm.R1, ctx).WithSymbol("address"),
		asm.Mov.Imm(asm.R5, net),
		asm.FnSkbLoadBytesRelative.Call(),
		asm.JNE.Imm(asm.R0, 0, "steered"),
		asm.LoadMapPtr(asm.R1, e.probes.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, key),
		load.Call(),
		asm.JEq.Imm(asm.R0, 0, "steered"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
		asm.StoreMem(asm.RFP, slot, asm.R1, asm.Word),
		asm.Ja.Label("select"),

		// The set that counts, and in it the slot that the hash says.
		asm.StoreImm(asm.RFP, slot, configTurn, asm.Word).WithSymbol("steered"),
		asm.LoadMapPtr(asm.R1, e.config.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, slot),
		load.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
		asm.StoreMem(asm.RFP, slot, asm.R1, asm.Word),
		asm.LoadMapPtr(asm.R1, e.config.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, slot),
		load.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
		asm.JEq.Imm(asm.R1, 0, "pass"),
		asm.LoadMem(asm.R2, ctx, mdHash, asm.Word),
		asm.Mod.Reg32(asm.R2, asm.R1),
		asm.And.Imm(asm.R2, mask),
		asm.Add.Reg(asm.R0, asm.R2),
		asm.LoadMem(asm.R1, asm.R0, sets, asm.Byte),
		asm.StoreMem(asm.RFP, slot, asm.R1, asm.Word),

		asm.Mov.Reg(asm.R1, ctx).WithSymbol("select"),
		asm.LoadMapPtr(asm.R2, e.socks.FD()),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, slot),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnSkSelectReuseport.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"),

		asm.StoreImm(asm.RFP, slot, configStray, asm.Word),
		asm.LoadMapPtr(asm.R1, e.config.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, slot),
		load.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),

		asm.Mov.Imm(asm.R0, pass).WithSymbol("pass"),
		asm.Return(),
	}
}

func (e *extended) add(s Slot, sock *os.File, first bool) error {
	if err := e.put(s, sock); err != nil {
		return err
	}
	if !first {
		// The program is the group's: the new listener came under it when it began to listen (reuseport_add_sock).
		return nil
	}
	err := e.choose([]Slot{s})
	if err == nil {
		err = sys.AttachReuseportExtended(sock, e.program.FD())
	}
	if err != nil {
		return errors.Join(err, e.remove(s))
	}
	return nil
}

func (e *extended) put(s Slot, sock *os.File) error {
	raw, err := sock.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = e.socks.Put(uint32(s), uint64(fd)) }); err != nil {
		return err
	}
	return inner
}

func (e *extended) steer(slots []Slot) error {
	if err := e.choose(slots); err != nil {
		return err
	}
	settle()
	return nil
}

// choose makes the program use a new set.
func (e *extended) choose(slots []Slot) error {
	set := configValue{N: uint32(len(slots))}
	for i, s := range slots {
		var cookie uint64
		if err := e.socks.Lookup(uint32(s), &cookie); errors.Is(err, ebpf.ErrKeyNotExist) {
			return ErrLeft
		} else if err != nil {
			return err
		}
		set.Slots[i] = uint8(s)
	}
	next := configSets + (e.turn-configSets+1)%2
	if err := e.config.Put(next, set); err != nil {
		return err
	}
	if err := e.config.Put(uint32(configTurn), configValue{N: next}); err != nil {
		return err
	}
	e.turn = next
	return nil
}

func (e *extended) probe(s Slot, from netip.AddrPort) error {
	if was, ok := e.from[s]; ok {
		if err := e.probes.Delete(keyOf(was)); err != nil {
			return err
		}
		delete(e.from, s)
		settle()
	}
	if !from.IsValid() {
		return nil
	}
	if err := e.probes.Put(keyOf(from), uint32(s)); err != nil {
		return err
	}
	e.from[s] = from
	return nil
}

func keyOf(from netip.AddrPort) probeKey {
	return probeKey{Addr: from.Addr().As16(), Port: [2]byte(binary.BigEndian.AppendUint16(nil, from.Port()))}
}

func (e *extended) remove(s Slot) error {
	// It isn't there any more if its program shut it down.
	if err := e.socks.Delete(uint32(s)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("slot %d: %w", s, err)
	}
	return nil
}

func (e *extended) strays() (uint64, error) {
	var entry [8 + Slots]byte
	if err := e.config.Lookup(uint32(configStray), &entry); err != nil {
		return 0, err
	}
	return binary.NativeEndian.Uint64(entry[:]), nil
}

func (e *extended) close() error {
	var errs []error
	for _, m := range []*ebpf.Map{e.socks, e.config, e.probes} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	if e.program != nil {
		errs = append(errs, e.program.Close())
	}
	return errors.Join(errs...)
}

// settle waits until the kernel has left every program that saw what was before. Where the kernel can't tell (nohz_full), a SYN that a CPU
// was just handling may still go by that.
func settle() { _ = sys.WaitGracePeriod() }
