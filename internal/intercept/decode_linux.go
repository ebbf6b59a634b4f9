package intercept

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/berth-net/berth/internal/sys"
)

// maxValue bounds what is read of an option's value. No option that a listener would keep is longer.
const maxValue = 256

// errTooLong is the [Call] error for a value that was not read.
var errTooLong = errors.New("the option's value is too long")

// decode makes a Call of a notification and of the caller's memory.
func (l *Listener) decode(n *sys.SeccompNotif) *Call {
	c := &Call{ID: n.ID, TID: int(n.PID), FD: -1, listener: l}
	args := n.Data.Args
	for _, abi := range sys.SeccompABIs {
		if abi.Arch != n.Data.Arch {
			continue
		}
		c.Compat = abi.Compat
		nr := uint32(n.Data.Nr)
		switch {
		case slices.Contains(abi.Bind, nr):
			c.Op = Bind
		case slices.Contains(abi.Listen, nr):
			c.Op = Listen
		case slices.Contains(abi.Setsockopt, nr):
			c.Op = Setsockopt
		case abi.Socketcall != 0 && abi.Socketcall == nr:
			c.Op = map[uint32]Op{
				sys.SYS_SOCKETCALL_BIND: Bind, sys.SYS_SOCKETCALL_LISTEN: Listen, sys.SYS_SOCKETCALL_SETSOCKOPT: Setsockopt,
			}[uint32(args[0])]
			if args, c.Err = l.socketcallArgs(c, args[1]); c.Err != nil {
				return c
			}
		}
	}
	// Each argument is an int or a pointer; the kernel ignores the upper half of an int.
	c.FD = int(int32(args[0]))
	switch c.Op {
	case Bind:
		l.decodeBind(c, args[1], int(int32(args[2])))
	case Listen:
		c.Backlog = int(int32(args[1]))
	case Setsockopt:
		c.Level, c.Name = int(int32(args[1])), int(int32(args[2]))
		length := int(int32(args[4]))
		switch {
		case length > maxValue:
			c.Err = errTooLong
		case length > 0:
			c.Value, c.Err = l.read(c, args[3], length)
		}
	}
	return c
}

// socketcallArgs reads the arguments of a socketcall, which are 32-bit words in memory.
func (l *Listener) socketcallArgs(c *Call, addr uint64) (args [6]uint64, err error) {
	count := 2 // listen
	switch c.Op {
	case Bind:
		count = 3
	case Setsockopt:
		count = 5
	}
	words, err := l.read(c, addr&0xffffffff, 4*count)
	if err != nil {
		return args, err
	}
	for i := range count {
		args[i] = uint64(binary.NativeEndian.Uint32(words[4*i:]))
	}
	return args, nil
}

// decodeBind fills in the address of a bind. The kernel refuses an address outside of these bounds before it looks at it.
func (l *Listener) decodeBind(c *Call, addr uint64, length int) {
	if length < 2 || length > maxSockaddr {
		return
	}
	if c.Sockaddr, c.Err = l.read(c, addr, length); c.Err != nil {
		return
	}
	s := parseSockaddr(c.Sockaddr)
	c.Family, c.Addr, c.ScopeID, c.FlowInfo = s.family, s.addr, s.scopeID, s.flowInfo
}

// read copies length bytes of the caller's memory.
func (l *Listener) read(c *Call, addr uint64, length int) ([]byte, error) {
	buf := make([]byte, length)
	n, err := sys.ReadMemory(c.TID, addr, buf)
	if err == nil && n < length {
		err = fmt.Errorf("only %d of %d bytes at %#x are mapped", n, length, addr)
	}
	if err := c.lookedUp(err); err != nil {
		return nil, fmt.Errorf("the caller's memory: %w", err)
	}
	return buf, nil
}
