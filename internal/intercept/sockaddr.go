package intercept

import (
	"encoding/binary"
	"net/netip"
)

// sockaddr is what a program's struct sockaddr says.
type sockaddr struct {
	family   int
	addr     netip.AddrPort // invalid unless it is an Internet address
	scopeID  uint32
	flowInfo uint32
}

// Linux's numbers of the families.
const (
	afUnspec = 0
	afInet   = 2
	afInet6  = 10
)

// parseSockaddr reads an address as the kernel's bind would: net/ipv4/af_inet.c, net/ipv6/af_inet6.c. Any bytes may come.
func parseSockaddr(b []byte) sockaddr {
	if len(b) < 2 {
		return sockaddr{}
	}
	s := sockaddr{family: int(binary.NativeEndian.Uint16(b))}
	switch {
	case (s.family == afInet || s.family == afUnspec) && len(b) >= 16:
		ip := netip.AddrFrom4([4]byte(b[4:8]))
		// __inet_bind: an AF_INET socket takes AF_UNSPEC as AF_INET, for INADDR_ANY only.
		if s.family == afInet || ip.IsUnspecified() {
			s.addr = netip.AddrPortFrom(ip, binary.BigEndian.Uint16(b[2:]))
		}
	case s.family == afInet6 && len(b) >= 24: // SIN6_LEN_RFC2133: sin6_scope_id came later and may be missing
		s.addr = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), binary.BigEndian.Uint16(b[2:]))
		s.flowInfo = binary.BigEndian.Uint32(b[4:])
		if len(b) >= 28 {
			s.scopeID = binary.NativeEndian.Uint32(b[24:])
		}
	}
	return s
}
