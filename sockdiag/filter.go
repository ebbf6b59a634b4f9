package sockdiag

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// A Filter says which sockets a dump is to name. The zero Filter names every TCP socket of both families.
type Filter struct {
	// States that match; zero for all.
	States States
	// LocalPorts that match; none for all.
	LocalPorts []uint16
	// Family that matches; zero for both.
	Family Family
	// Info asks for TCP_INFO too, for which the kernel takes each socket's lock.
	Info bool
}

// Operations of the kernel's filter, include/uapi/linux/inet_diag.h.
const (
	opJump        = 1
	opLocalPortGE = 2
	opLocalPortLE = 3
	opLen         = 4
	// Every run of ports becomes GE port, LE port, JMP: two operations each for the first two, whose second holds the port.
	runLen = 5 * opLen
)

// bytecode compiles the ports to a filter. A program that ends exactly at its length accepts, one that jumps
// four bytes past it rejects. The kernel verifies that every jump lands on an operation.
func (f *Filter) bytecode() ([]byte, error) {
	if len(f.LocalPorts) == 0 {
		return nil, nil
	}
	ports := slices.Clone(f.LocalPorts)
	slices.Sort(ports)
	type run struct{ first, last uint16 }
	var runs []run
	for _, p := range ports {
		if n := len(runs); n > 0 && int(p) <= int(runs[n-1].last)+1 {
			runs[n-1].last = p
			continue
		}
		runs = append(runs, run{p, p})
	}
	size := len(runs) * runLen
	if size > 1<<15 { // a jump is 16 bits, and so is an attribute's length
		return nil, fmt.Errorf("sockdiag: filter of %d separate ports: at most %d fit", len(runs), (1<<15)/runLen)
	}
	code := make([]byte, 0, size)
	op := func(code []byte, op, yes byte, no int) []byte {
		return binary.NativeEndian.AppendUint16(append(code, op, yes), uint16(no))
	}
	for i, r := range runs {
		rest := size - i*runLen
		next := runLen // from the start of this run to the next one
		if i == len(runs)-1 {
			next = rest + opLen // reject
		}
		code = op(code, opLocalPortGE, 2*opLen, next)
		code = op(code, 0, 0, int(r.first))
		code = op(code, opLocalPortLE, 2*opLen, next-2*opLen)
		code = op(code, 0, 0, int(r.last))
		code = op(code, opJump, opLen, rest-4*opLen) // accept
	}
	return code, nil
}
