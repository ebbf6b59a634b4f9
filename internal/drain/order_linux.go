package drain

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
)

// orderSize is how many connections an Order remembers; beyond it forgets the ones unused for longest. 112 bytes each.
const orderSize = 1 << 15

// An Order notes the exact order of what comes in and goes out on each TCP connection of a cgroup: two BPF programs,
// one at its ingress and one at its egress, keep an [Activity] for each socket.
//
// A socket belongs to the cgroup in which it was made, and an accepted connection to that of its listener. If others make a
// generation's listeners, attach to a cgroup that has them among its descendants too.
type Order struct {
	activities      *ebpf.Map
	ingress, egress link.Link
	programs        [2]*ebpf.Program // ingress, egress
}

// NewOrder attaches to the cgroup v2 at the path (a directory) until Close. It needs CAP_BPF and CAP_NET_ADMIN; where it's
// refused, the error says why, and draining goes by the connections' counters.
func NewOrder(cgroupPath string) (*Order, error) {
	// Before Linux 5.11 a map counts against the limit of locked memory.
	limitErr := rlimit.RemoveMemlock()
	o := new(Order)
	fail := func(what string, err error) (*Order, error) {
		if errors.Is(err, ebpf.ErrNotSupported) {
			what += ", which this kernel lacks"
		}
		return nil, errors.Join(fmt.Errorf("can't note the order of packets in %s: %s: %w", cgroupPath, what, err), o.Close(), limitErr)
	}
	var err error
	o.activities, err = ebpf.NewMap(&ebpf.MapSpec{
		Name: "berth_order", Type: ebpf.LRUHash, KeySize: 8, ValueSize: activitySize, MaxEntries: orderSize,
	})
	if err != nil {
		return fail("make a BPF map", err)
	}
	attach := func(i int, name string, at ebpf.AttachType, code asm.Instructions) (l link.Link, err error) {
		o.programs[i], err = ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: name, Type: ebpf.CGroupSKB, AttachType: at, License: "Apache-2.0", Instructions: code,
		})
		if err != nil {
			return nil, err
		}
		return link.AttachCgroup(link.CgroupOptions{Path: cgroupPath, Attach: at, Program: o.programs[i]})
	}
	if o.egress, err = attach(1, "berth_order_out", ebpf.AttachCGroupInetEgress, egressProgram(o.activities.FD())); err != nil {
		return fail("attach to its egress", err)
	}
	if o.ingress, err = attach(0, "berth_order_in", ebpf.AttachCGroupInetIngress, ingressProgram(o.activities.FD())); err != nil {
		return fail("attach to its ingress", err)
	}
	return o, nil
}

// Lookup tells what is known of the socket with that cookie. Nothing is known of one that has carried no payload
// since the Order was made, or whose entry had to make room.
func (o *Order) Lookup(cookie uint64) (Activity, bool) {
	var v value
	if err := o.activities.Lookup(&cookie, &v); err != nil {
		return Activity{}, false
	}
	return v.activity(), true
}

// Close detaches from the cgroup; nothing stays behind.
func (o *Order) Close() error {
	var errs []error
	for _, l := range []link.Link{o.ingress, o.egress} {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	for _, p := range o.programs {
		if p != nil {
			errs = append(errs, p.Close())
		}
	}
	if o.activities != nil {
		errs = append(errs, o.activities.Close())
	}
	return errors.Join(errs...)
}

// value is an Activity as the programs keep it.
type value struct {
	LastIn, LastOut, LastACK uint64 // ns of CLOCK_MONOTONIC
	Gap                      uint64 // longest of earlier responses, fading
	GapNow                   uint64 // longest of the present response
	InEnd, OutEnd            uint32 // sequence number after the newest payload
	Responses                uint32
	Open                     uint8 // how the last payload out ended: endsLine, endsHead, endsBody or none of these
	OpenEnds                 uint8 // the ways in which a whole response has ended here
	_                        [2]byte
}

// Where the programs find its fields.
const (
	offLastIn    = 0
	offLastOut   = 8
	offLastACK   = 16
	offGap       = 24
	offGapNow    = 32
	offInEnd     = 40
	offOutEnd    = 44
	offResponses = 48
	offOpen      = 52
	offOpenEnds  = 53
	activitySize = 56

	endsLine = 1 // CR LF: a chunk, though not the last one
	endsHead = 2 // CR LF CR LF: a header, though not the end of a chunked body
	endsBody = 4 // the end of a chunked body

	// A payload that leaves so soon after an ACK was waiting for it (Nagle, a full window): the handler wrote it earlier.
	ackClocked = 200 * time.Microsecond
)

// activity is the value for the world outside.
func (v *value) activity() Activity {
	return Activity{
		LastIn:    time.Duration(v.LastIn),
		LastOut:   time.Duration(v.LastOut),
		Gap:       time.Duration(max(v.Gap, v.GapNow)),
		Responses: v.Responses,
		Open:      v.Open&(endsLine|endsHead) != 0 && v.Open&v.OpenEnds == 0,
		Complete:  v.Open == endsBody,
	}
}

// Offsets in struct __sk_buff.
const (
	skbLen     = 0
	skbData    = 76
	skbDataEnd = 80
)

// The stack of both programs.
const (
	stackKey  = -8
	stackTail = -16 // last bytes of the payload
	stackNew  = stackTail - activitySize
)

// prologue leaves the number of payload bytes in R8, the sequence number after them in R7 and the packet in R6. It goes to "pass"
// for what isn't TCP, and to the label bare for TCP without payload.
// Packets start with the IP header here. Headers are linear: TCP has pulled them on the way in and pushed them on the way out.
func prologue(bare string) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R2, asm.R6, skbData, asm.Word),
		asm.LoadMem(asm.R3, asm.R6, skbDataEnd, asm.Word),
		asm.Mov.Reg(asm.R0, asm.R2),
		asm.Add.Imm(asm.R0, 40), // an IPv6 header, or IPv4 and TCP
		asm.JGT.Reg(asm.R0, asm.R3, "pass"),
		asm.LoadMem(asm.R0, asm.R2, 0, asm.Byte),
		asm.Mov.Reg(asm.R8, asm.R0),
		asm.RSh.Imm(asm.R0, 4),
		asm.JEq.Imm(asm.R0, 6, "ipv6"),
		asm.JNE.Imm(asm.R0, 4, "pass"),
		asm.LoadMem(asm.R0, asm.R2, 9, asm.Byte),
		asm.JNE.Imm(asm.R0, 6, "pass"),
		asm.And.Imm(asm.R8, 0x0f),
		asm.LSh.Imm(asm.R8, 2),
		asm.Ja.Label("tcp"),

		asm.LoadMem(asm.R0, asm.R2, 6, asm.Byte).WithSymbol("ipv6"),
		asm.Mov.Imm(asm.R8, 40),
		asm.JEq.Imm(asm.R0, 6, "tcp"),
		asm.JNE.Imm(asm.R0, 0, "pass"), // a hop-by-hop header: BIG TCP
		asm.Mov.Reg(asm.R0, asm.R2),
		asm.Add.Imm(asm.R0, 48),
		asm.JGT.Reg(asm.R0, asm.R3, "pass"),
		asm.LoadMem(asm.R0, asm.R2, 40, asm.Byte),
		asm.JNE.Imm(asm.R0, 6, "pass"),
		asm.LoadMem(asm.R8, asm.R2, 41, asm.Byte),
		asm.LSh.Imm(asm.R8, 3),
		asm.Add.Imm(asm.R8, 48),

		// R8 is where the TCP header starts.
		asm.Add.Reg(asm.R2, asm.R8).WithSymbol("tcp"),
		asm.Mov.Reg(asm.R0, asm.R2),
		asm.Add.Imm(asm.R0, 20),
		asm.JGT.Reg(asm.R0, asm.R3, "pass"),
		asm.LoadMem(asm.R0, asm.R2, 12, asm.Byte), // data offset
		asm.RSh.Imm(asm.R0, 2),
		asm.And.Imm(asm.R0, 0x3c),
		asm.Add.Reg(asm.R0, asm.R8),
		asm.LoadMem(asm.R8, asm.R6, skbLen, asm.Word),
		asm.Sub.Reg(asm.R8, asm.R0),
		asm.JSLE.Imm(asm.R8, 0, bare),
		asm.LoadMem(asm.R7, asm.R2, 4, asm.Word), // sequence number
		asm.HostTo(asm.BE, asm.R7, asm.Word),
		asm.Add.Reg32(asm.R7, asm.R8),
	}
}

// find looks up the connection's value into R0 and the time into R9, and goes to the label if there is none.
func find(mapFD int, none string) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.FnGetSocketCookie.Call(),
		asm.StoreMem(asm.RFP, stackKey, asm.R0, asm.DWord),
		asm.FnKtimeGetNs.Call(),
		asm.Mov.Reg(asm.R9, asm.R0),
		asm.LoadMapPtr(asm.R1, mapFD),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, stackKey),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, none),
	}
}

// create makes the connection's value from what set puts on the stack, then lets the packet pass.
func create(mapFD int, set ...asm.Instruction) asm.Instructions {
	code := asm.Instructions{asm.Mov.Imm(asm.R0, 0).WithSymbol("new")}
	for at := int16(0); at < activitySize; at += 8 {
		code = append(code, asm.StoreMem(asm.RFP, stackNew+at, asm.R0, asm.DWord))
	}
	code = append(code, set...)
	return append(code,
		asm.LoadMapPtr(asm.R1, mapFD),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, stackKey),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, stackNew),
		asm.Mov.Imm(asm.R4, 0), // BPF_ANY
		asm.FnMapUpdateElem.Call(),
	)
}

// pass ends a program: the packet goes on.
func pass() asm.Instructions {
	return asm.Instructions{
		asm.Mov.Imm(asm.R0, 1).WithSymbol("pass"),
		asm.Return(),
	}
}

// ingressProgram notes what comes in. It runs before TCP does, so a request is known before the program can read it.
func ingressProgram(mapFD int) asm.Instructions {
	acknowledge := find(mapFD, "pass")
	acknowledge[0] = acknowledge[0].WithSymbol("bare")
	return slices.Concat(prologue("bare"), find(mapFD, "new"), asm.Instructions{
		// What was here before comes again: our ACK was lost, or it's a keepalive with a byte.
		asm.LoadMem(asm.R1, asm.R0, offLastIn, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "fresh"),
		asm.LoadMem(asm.R2, asm.R0, offInEnd, asm.Word),
		asm.Mov.Reg32(asm.R3, asm.R7),
		asm.Sub.Reg32(asm.R3, asm.R2),
		asm.JSLE.Imm32(asm.R3, 0, "pass"),

		// The first payload after a response ends that response.
		asm.LoadMem(asm.R2, asm.R0, offLastOut, asm.DWord).WithSymbol("fresh"),
		asm.JGE.Reg(asm.R1, asm.R2, "note"),
		asm.LoadMem(asm.R2, asm.R0, offGap, asm.DWord),
		asm.Mov.Reg(asm.R3, asm.R2),
		asm.RSh.Imm(asm.R3, fadeShift),
		asm.Sub.Reg(asm.R2, asm.R3),
		asm.LoadMem(asm.R3, asm.R0, offGapNow, asm.DWord),
		asm.JGE.Reg(asm.R2, asm.R3, "faded"),
		asm.Mov.Reg(asm.R2, asm.R3),
		asm.StoreMem(asm.R0, offGap, asm.R2, asm.DWord).WithSymbol("faded"),
		asm.Mov.Imm(asm.R2, 0),
		asm.StoreMem(asm.R0, offGapNow, asm.R2, asm.DWord),
		asm.LoadMem(asm.R2, asm.R0, offOpen, asm.Byte),
		asm.LoadMem(asm.R3, asm.R0, offOpenEnds, asm.Byte),
		asm.Or.Reg(asm.R3, asm.R2),
		asm.StoreMem(asm.R0, offOpenEnds, asm.R3, asm.Byte),

		asm.StoreMem(asm.R0, offInEnd, asm.R7, asm.Word).WithSymbol("note"),
		asm.StoreMem(asm.R0, offLastIn, asm.R9, asm.DWord),
		asm.Ja.Label("pass"),
	}, acknowledge, asm.Instructions{
		asm.StoreMem(asm.R0, offLastACK, asm.R9, asm.DWord),
		asm.Ja.Label("pass"),
	}, create(mapFD,
		asm.StoreMem(asm.RFP, stackNew+offLastIn, asm.R9, asm.DWord),
		asm.StoreMem(asm.RFP, stackNew+offInEnd, asm.R7, asm.Word),
	), pass())
}

// egressProgram notes what goes out. An ACK without payload is none of its business.
func egressProgram(mapFD int) asm.Instructions {
	return slices.Concat(prologue("pass"), ending(), find(mapFD, "new"), asm.Instructions{
		asm.LoadMem(asm.R1, asm.R0, offLastOut, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "begin"),
		// A retransmission says nothing about the newest request.
		asm.LoadMem(asm.R2, asm.R0, offOutEnd, asm.Word),
		asm.Mov.Reg32(asm.R3, asm.R7),
		asm.Sub.Reg32(asm.R3, asm.R2),
		asm.JSLE.Imm32(asm.R3, 0, "pass"),

		asm.LoadMem(asm.R2, asm.R0, offLastIn, asm.DWord),
		asm.JGT.Reg(asm.R2, asm.R1, "begin"),
		// Another payload of the same response, after a gap.
		asm.LoadMem(asm.R2, asm.R0, offLastACK, asm.DWord),
		asm.Add.Imm(asm.R2, int32(ackClocked)),
		asm.JGE.Reg(asm.R2, asm.R9, "note"),
		asm.Mov.Reg(asm.R2, asm.R9),
		asm.Sub.Reg(asm.R2, asm.R1),
		asm.LoadMem(asm.R3, asm.R0, offGapNow, asm.DWord),
		asm.JGE.Reg(asm.R3, asm.R2, "note"),
		asm.StoreMem(asm.R0, offGapNow, asm.R2, asm.DWord),
		asm.Ja.Label("note"),

		asm.LoadMem(asm.R2, asm.R0, offResponses, asm.Word).WithSymbol("begin"),
		asm.Add.Imm(asm.R2, 1),
		asm.StoreMem(asm.R0, offResponses, asm.R2, asm.Word),

		asm.StoreMem(asm.R0, offOutEnd, asm.R7, asm.Word).WithSymbol("note"),
		asm.StoreMem(asm.R0, offOpen, asm.R8, asm.Byte),
		asm.StoreMem(asm.R0, offLastOut, asm.R9, asm.DWord),
		asm.Ja.Label("pass"),
	}, create(mapFD,
		asm.StoreMem(asm.RFP, stackNew+offLastOut, asm.R9, asm.DWord),
		asm.StoreMem(asm.RFP, stackNew+offOutEnd, asm.R7, asm.Word),
		asm.StoreImm(asm.RFP, stackNew+offResponses, 1, asm.Word),
		asm.StoreMem(asm.RFP, stackNew+offOpen, asm.R8, asm.Byte),
	), pass())
}

// ending replaces the payload's length in R8 by how it ends. One that ends with CR LF is part of an HTTP message that goes on, unless the
// protocol ends its responses so; one that ends with an empty chunk ("0 CR LF CR LF" after CR LF, or alone) ends a chunked body.
func ending() asm.Instructions {
	const crlf, crlfcrlf, zero = 0x0d0a, 0x0d0a0d0a, '0'
	// tail loads the last bytes of the packet, so many of them, to the stack.
	tail := func(n int32, at int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.LoadMem(asm.R2, asm.R6, skbLen, asm.Word),
			asm.Sub.Imm(asm.R2, n),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, at),
			asm.Mov.Imm(asm.R4, min(n, 5)),
			asm.FnSkbLoadBytes.Call(),
			asm.JNE.Imm(asm.R0, 0, "ended"),
		}
	}
	return slices.Concat(asm.Instructions{
		asm.Mov.Imm(asm.R9, 0),
		asm.JLT.Imm(asm.R8, 5, "ended"),
	}, tail(5, stackTail+3), asm.Instructions{ // so that the last four are aligned
		asm.LoadMem(asm.R1, asm.RFP, stackTail+4, asm.Word),
		asm.HostTo(asm.BE, asm.R1, asm.Word),
		asm.JEq.Imm(asm.R1, crlfcrlf, "head"),
		asm.And.Imm(asm.R1, 0xffff),
		asm.JNE.Imm(asm.R1, crlf, "ended"),
		asm.Mov.Imm(asm.R9, endsLine),
		asm.Ja.Label("ended"),

		asm.Mov.Imm(asm.R9, endsHead).WithSymbol("head"),
		asm.LoadMem(asm.R1, asm.RFP, stackTail+3, asm.Byte),
		asm.JNE.Imm(asm.R1, zero, "ended"),
		asm.JEq.Imm(asm.R8, 5, "body"),
		asm.JLT.Imm(asm.R8, 7, "ended"),
	}, tail(7, stackTail), asm.Instructions{
		asm.LoadMem(asm.R1, asm.RFP, stackTail, asm.Half),
		asm.HostTo(asm.BE, asm.R1, asm.Half),
		asm.JNE.Imm(asm.R1, crlf, "ended"),
		asm.Mov.Imm(asm.R9, endsBody).WithSymbol("body"),
		asm.Mov.Reg(asm.R8, asm.R9).WithSymbol("ended"),
	})
}
