package sockdiag

import (
	"net/netip"
	"time"
)

// A Family is an address family, numbered as Linux does.
type Family uint8

// The families of TCP.
const (
	INET  Family = 2
	INET6 Family = 10
)

// A Protocol is an IP protocol's number.
type Protocol uint8

// TCP is the protocol of all sockets that are seen. An MPTCP connection shows as its TCP subflows.
const TCP Protocol = 6

// A Socket is one socket as the kernel described it.
type Socket struct {
	// Family is the socket's own. A dual-stack socket's IPv4 connection is of INET6; its addresses are IPv4 here,
	// not IPv4-mapped.
	Family   Family
	Protocol Protocol
	State    State

	Local, Remote netip.AddrPort
	Interface     uint32 // index of the device it is bound to, or 0
	Cookie        uint64 // the kernel's name for it, never used twice; SO_COOKIE

	Timer       Timer
	Expires     time.Duration // until the timer ends
	Retransmits uint8         // or probes, whichever the timer is for

	// RecvQueue is the number of bytes that the program hasn't read; of a listener, the connections that wait for accept.
	RecvQueue uint32
	// SendQueue is the number of bytes that the peer hasn't acknowledged, sent or not; of a listener, the backlog.
	SendQueue uint32

	UID      uint32 // of the socket's file
	Inode    uint32 // of the socket's file; 0 while no process has it: before accept, and after the last close
	V6Only   bool
	CgroupID uint64 // the cgroup v2 in which it was made, or that of its listener; the directory's inode number

	// Info is TCP_INFO, if the filter asked for it and the state has it (HasInfo): TIME_WAIT and SYN_RECV don't.
	Info    TCPInfo
	HasInfo bool
}

// An ID tells a connection from all others.
type ID struct {
	Local, Remote netip.AddrPort
	Interface     uint32
	Cookie        uint64 // 0: whichever has the four-tuple now
}

// ID is what finds this socket again.
func (s *Socket) ID() ID {
	return ID{Local: s.Local, Remote: s.Remote, Interface: s.Interface, Cookie: s.Cookie}
}
