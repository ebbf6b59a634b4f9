//go:build linux

package keeper

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/berth-net/berth/internal/sys"
)

// Form is the identity under which the kernel groups listeners: the family (that of Addr, where a v4-mapped
// address is IPv6), v6only, the address with its port, and the device.
type Form struct {
	Addr   netip.AddrPort `json:"addr"`
	V6Only bool           `json:"v6only,omitempty"`
	Device int            `json:"device,omitempty"` // interface index, 0 for any
}

// Family is the address family of the form's sockets.
func (f Form) Family() int {
	if f.Addr.Addr().Is4() {
		return sys.INET
	}
	return sys.INET6
}

// String is the address as one writes it, with what else tells the form apart.
func (f Form) String() string {
	s := f.Addr.String()
	if f.V6Only && f.Addr.Addr().IsUnspecified() {
		s += " (v6only)"
	}
	if f.Device != 0 {
		s += " (interface " + strconv.Itoa(f.Device) + ")"
	}
	return s
}

// Overlaps reports whether a connection exists that listeners of both forms could take.
func (f Form) Overlaps(g Form) bool {
	if f.Addr.Port() != g.Addr.Port() || f.Device != 0 && g.Device != 0 && f.Device != g.Device {
		return false
	}
	meet := func(a, b netip.Addr) bool {
		return a.IsValid() && b.IsValid() && (a == b || a.IsUnspecified() || b.IsUnspecified())
	}
	a4, a6 := f.covers()
	b4, b6 := g.covers()
	return meet(a4, b4) || meet(a6, b6)
}

// covers is the IPv4 and the IPv6 address that a listener of the form takes; unspecified means all of the family, invalid none.
func (f Form) covers() (v4, v6 netip.Addr) {
	addr := f.Addr.Addr().WithZone("")
	switch {
	case addr.Is4() || addr.Is4In6():
		return addr.Unmap(), netip.Addr{}
	case addr.IsUnspecified() && !f.V6Only:
		return netip.IPv4Unspecified(), addr
	}
	return netip.Addr{}, addr
}

// Reach is an address of this machine at which a listener of the form can be reached, and not one of the other forms
// that there are: the kernel prefers a listener of one address to one of all.
func (f Form) Reach(others ...Form) netip.AddrPort {
	choice := []netip.Addr{f.Addr.Addr().Unmap()}
	if v4, v6 := f.covers(); v4.IsUnspecified() || v6.IsUnspecified() {
		choice = nil
		for _, a := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback(), netip.AddrFrom4([4]byte{127, 0, 0, 2})} {
			if a.Is4() && v4.IsValid() || a.Is6() && v6.IsValid() {
				choice = append(choice, a)
			}
		}
	}
	for _, a := range choice {
		if !slices.ContainsFunc(others, func(o Form) bool {
			return o != f && o.preference(a) >= f.preference(a) && o.Addr.Port() == f.Addr.Port()
		}) {
			return netip.AddrPortFrom(a, f.Addr.Port())
		}
	}
	return netip.AddrPortFrom(choice[0], f.Addr.Port())
}

// preference is the kernel's, among listeners that would take a connection to an address (compute_score in net/ipv4 and
// net/ipv6/inet6_hashtables.c); 0 for one that would not.
func (f Form) preference(a netip.Addr) int {
	v4, v6 := f.covers()
	switch {
	case v4 == a || v6 == a:
		return 3
	case a.Is4() && v4.IsUnspecified() && f.Addr.Addr().Is4():
		return 2
	case a.Is4() && v4.IsUnspecified() || a.Is6() && v6.IsUnspecified():
		return 1
	}
	return 0
}
